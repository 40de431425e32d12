"""The memory of a training step: counting it, measuring it, and fitting it to a device."""

"""The memory of a training step: counted, measured, and made to fit a device."""

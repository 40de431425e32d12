"""Chat templates, which turn messages into text for a model."""

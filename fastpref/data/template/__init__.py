"""Chat templates, which turn messages into a model's text."""

"""Chat templates: what a model's text looks like."""

"""The formats of preference rows: a row becomes a prompt and its completions."""

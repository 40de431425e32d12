"""The formats of preference rows, which turn a row into a prompt and its completions."""

"""One training step: its loss, its reference, its optimizer and its metrics."""

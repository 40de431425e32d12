"""The files of a run, and resuming a run from them."""

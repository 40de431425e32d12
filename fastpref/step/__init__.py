"""One step of training: what it plans, computes, and measures."""

"""What memory a step takes: counted, measured, and made to fit."""

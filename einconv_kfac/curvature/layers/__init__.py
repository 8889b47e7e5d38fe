"""Which module has which block."""

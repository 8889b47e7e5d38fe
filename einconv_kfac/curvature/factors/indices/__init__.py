"""Which positions meet which kernel entries; no tensors."""

"""The algorithms for the input factor of a convolution, one per file."""

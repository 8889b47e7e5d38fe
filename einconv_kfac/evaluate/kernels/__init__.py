"""The contractions of a convolution, one way to compute them per file."""

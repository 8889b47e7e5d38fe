"""Kernels: the contractions of a convolution, one algorithm per file."""

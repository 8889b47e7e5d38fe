"""Convolutions, im2col and their adjoints in any dimension, as functions."""

from einconv_kfac.functionals.conv import convNd
from einconv_kfac.functionals.conv_transpose import conv_transposeNd
from einconv_kfac.functionals.unfold import foldNd, unfoldNd, unfoldNd_transpose

__all__ = ["convNd", "conv_transposeNd", "foldNd", "unfoldNd", "unfoldNd_transpose"]

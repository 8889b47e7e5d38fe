"""Convolutions and im2col in any dimension, as functions."""

from einconv_kfac.functionals.conv import convNd
from einconv_kfac.functionals.unfold import unfoldNd

__all__ = ["convNd", "unfoldNd"]

"""Layers for convolutions and im2col in any dimension."""

from einconv_kfac.modules.conv import ConvNd
from einconv_kfac.modules.unfold import UnfoldNd

__all__ = ["ConvNd", "UnfoldNd"]

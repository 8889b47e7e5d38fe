"""Layers for convolutions, im2col and their adjoints in any dimension."""

from einconv_kfac.modules.conv import ConvNd
from einconv_kfac.modules.conv_transpose import ConvTransposeNd
from einconv_kfac.modules.conversion import convert
from einconv_kfac.modules.fold import FoldNd
from einconv_kfac.modules.unfold import UnfoldNd
from einconv_kfac.modules.unfold_transpose import UnfoldTransposeNd

__all__ = ["ConvNd", "ConvTransposeNd", "FoldNd", "UnfoldNd", "UnfoldTransposeNd", "convert"]

"""Contraction of networks and of convolutions.

`evaluate` contracts any network: index patterns become window views and folds, the remaining
operands are contracted pairwise. `contract_convolution` contracts a convolution's network by
kernels written for it, selected from the sizes.
"""

from einconv_kfac.evaluate.contraction import evaluate
from einconv_kfac.evaluate.trilinear import contract_convolution

__all__ = ["contract_convolution", "evaluate"]

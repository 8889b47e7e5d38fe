"""Networks and tensors, contracted.

`evaluate` contracts any network: patterns become window views and folds, what remains is
contracted pairwise. `convolution` contracts the one network that matters most, a
convolution's, in the order that its sizes suggest.
"""

from einconv_kfac.evaluate.contraction import evaluate
from einconv_kfac.evaluate.kernels.trilinear import convolution

__all__ = ["convolution", "evaluate"]

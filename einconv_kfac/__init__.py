"""Second-order optimization for PyTorch, built on convolutions as tensor networks."""

from einconv_kfac import modules
from einconv_kfac.curvature import conv_input_factor, coverage, kronecker_factors, verify
from einconv_kfac.expressions.pattern import index_pattern
from einconv_kfac.expressions.simplification import simplify
from einconv_kfac.optim import KFAC, KFACPreconditioner

__version__ = "0.1.0.dev0"

__all__ = [
    "KFAC",
    "KFACPreconditioner",
    "__version__",
    "conv_input_factor",
    "coverage",
    "index_pattern",
    "kronecker_factors",
    "modules",
    "simplify",
    "verify",
]

"""Second-order optimization for PyTorch, built on convolutions as tensor networks."""

from einconv_kfac.expressions.pattern import index_pattern
from einconv_kfac.expressions.simplification import simplify
from einconv_kfac.optim import KFAC, KFACPreconditioner

__version__ = "0.1.0.dev0"

__all__ = ["KFAC", "KFACPreconditioner", "index_pattern", "simplify"]

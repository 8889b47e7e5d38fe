"""Second-order optimization for PyTorch, built on convolutions as tensor networks."""

from einconv_kfac.expressions.pattern import index_pattern
from einconv_kfac.expressions.simplification import simplify

__version__ = "0.1.0.dev0"

__all__ = ["index_pattern", "simplify"]

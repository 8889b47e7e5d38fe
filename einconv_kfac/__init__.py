"""Second-order optimization for PyTorch, built on convolutions as tensor networks.

A public name is imported when it is first used, so that ``import einconv_kfac`` costs nothing, and
``einconv_kfac.functionals`` does not import the optimizers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
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

_ORIGINS = {
    "KFAC": "einconv_kfac.optim",
    "KFACPreconditioner": "einconv_kfac.optim",
    "conv_input_factor": "einconv_kfac.curvature",
    "coverage": "einconv_kfac.curvature",
    "index_pattern": "einconv_kfac.expressions.pattern",
    "kronecker_factors": "einconv_kfac.curvature",
    "simplify": "einconv_kfac.expressions.simplification",
    "verify": "einconv_kfac.curvature",
}
"""The module that each public name is imported from; tests compare it with the imports above."""

_ROOMS = (
    "curvature",
    "distributed",
    "evaluate",
    "expressions",
    "functionals",
    "geometry",
    "modules",
    "network",
    "optim",
)

if not TYPE_CHECKING:  # type checkers would take any name for one of the package

    def __getattr__(name: str) -> object:
        """Import a public name, or a room, at its first use (PEP 562)."""
        if name in _ORIGINS:
            value = getattr(import_module(_ORIGINS[name]), name)
        elif name in _ROOMS:
            value = import_module(f"einconv_kfac.{name}")
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        """The names of the package, imported or not."""
        return sorted({*globals(), *__all__, *_ROOMS})

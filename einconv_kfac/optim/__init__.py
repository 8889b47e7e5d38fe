"""Factors turned into steps."""

from einconv_kfac.optim.kfac import KFAC
from einconv_kfac.optim.preconditioner import KFACPreconditioner

__all__ = ["KFAC", "KFACPreconditioner"]

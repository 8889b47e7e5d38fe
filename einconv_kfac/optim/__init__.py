"""Factors turned into steps."""

from einconv_kfac.optim.kfac import KFAC

__all__ = ["KFAC"]

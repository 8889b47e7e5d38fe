"""Factors turned into steps."""

from einconv_kfac.optim.kfac import KFAC
from einconv_kfac.optim.preconditioner import KFACPreconditioner
from einconv_kfac.optim.step.damping.levenberg_marquardt import LevenbergMarquardt
from einconv_kfac.optim.step.damping.rule import DampingRule

__all__ = ["KFAC", "DampingRule", "KFACPreconditioner", "LevenbergMarquardt"]

"""The curvature of losses with respect to the model's output."""

from einconv_kfac.curvature.losses.loss_call import check_reduction, evaluate_loss
from einconv_kfac.curvature.losses.loss_registry import has_rule, loss_rule, register_loss
from einconv_kfac.curvature.losses.loss_rule import LossRule
from einconv_kfac.curvature.losses.rules.entrywise import EntrywiseRule

__all__ = [
    "EntrywiseRule",
    "LossRule",
    "check_reduction",
    "evaluate_loss",
    "has_rule",
    "loss_rule",
    "register_loss",
]

"""The curvature of losses with respect to the model's output, and a registry of them."""

from einconv_kfac.curvature.losses.classification import CrossEntropyRule, LogLikelihoodRule
from einconv_kfac.curvature.losses.entrywise import EntrywiseRule
from einconv_kfac.curvature.losses.registry import (
    LossRule,
    check_reduction,
    evaluate_loss,
    loss_rule,
    register_loss,
)

__all__ = [
    "CrossEntropyRule",
    "EntrywiseRule",
    "LogLikelihoodRule",
    "LossRule",
    "check_reduction",
    "evaluate_loss",
    "loss_rule",
    "register_loss",
]

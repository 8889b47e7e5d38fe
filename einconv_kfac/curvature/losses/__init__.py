"""The curvature of losses with respect to the model's output."""

from einconv_kfac.curvature.losses.local_expansion import local_expansion
from einconv_kfac.curvature.losses.loss_call import (
    check_reduction,
    depends_on_parameters,
    evaluate_loss,
)
from einconv_kfac.curvature.losses.loss_registry import (
    canonical_scores,
    has_rule,
    has_targets,
    loss_rule,
    register_loss,
    weighted_loss_rule,
)
from einconv_kfac.curvature.losses.loss_rule import LossRule, WeightedLossRule
from einconv_kfac.curvature.losses.rules.entrywise import EntrywiseRule

__all__ = [
    "EntrywiseRule",
    "LossRule",
    "WeightedLossRule",
    "canonical_scores",
    "check_reduction",
    "depends_on_parameters",
    "evaluate_loss",
    "has_rule",
    "has_targets",
    "local_expansion",
    "loss_rule",
    "register_loss",
    "weighted_loss_rule",
]

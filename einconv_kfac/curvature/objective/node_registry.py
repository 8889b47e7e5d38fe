"""The rule for each kind of nonlinear operation, by its name."""

from __future__ import annotations

from einconv_kfac.curvature.objective.node_rule import NodeRule
from einconv_kfac.curvature.objective.nodes import class_scores, entrywise, products, reductions

_RULES: tuple[NodeRule, ...] = (
    *entrywise.RULES,
    *class_scores.RULES,
    *products.RULES,
    *reductions.RULES,
)
NODE_RULES = {rule.kind: rule for rule in _RULES}
"""The rules, by the name of the operation."""

"""The rule for each kind of nonlinear operation, by its name."""

from __future__ import annotations

from einconv_kfac.curvature.objective.node_rule import NodeRule
from einconv_kfac.curvature.objective.nodes import (
    bernoulli,
    bilinear,
    derivatives,
    elementary,
    in_place,
    linear_systems,
    normalisation,
    reductions,
    softmax,
    spectra,
)

_RULES: tuple[NodeRule, ...] = (
    *elementary.RULES,
    *in_place.RULES,
    *bernoulli.RULES,
    *softmax.RULES,
    *bilinear.RULES,
    *normalisation.RULES,
    *reductions.RULES,
    *linear_systems.RULES,
    *spectra.RULES,
    *derivatives.RULES,
)
NODE_RULES = {rule.kind: rule for rule in _RULES}
"""The rules, by the name of the operation."""

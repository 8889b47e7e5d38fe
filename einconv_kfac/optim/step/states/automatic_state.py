"""What a saved state of the automatic step must be."""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch import Tensor

from einconv_kfac.optim.state_schema import (
    COUNT,
    FLAG,
    POSITIVE,
    Anything,
    Maybe,
    Record,
    Schema,
)
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.damping.search import DampingSearch
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.fits.subspace import SubspaceFit
from einconv_kfac.optim.step.momentum.slow_momentum import SlowMomentum
from einconv_kfac.optim.step.rollback import Rollback

_SCHEMAS: dict[str, Schema] = {
    "adapted": Maybe(COUNT),
    "agreement": Agreement.schema,
    "first": Maybe(POSITIVE),
    "keeps_layers": FLAG,
    "raised": POSITIVE,
    "rule": Anything(),
    "search": DampingSearch.schema,
    "subspace": SubspaceFit.schema,
    "rollback": Rollback.schema,
    "slow": SlowMomentum.schema,
}


def check_automatic_state(state: Any, rule: DampingRule, parameters: Mapping[str, Tensor]) -> None:
    """Raise a ``ValueError`` if a state is not one of the automatic step.

    A copy of the damping rule loads its part, since only the rule can tell what that must be.

    Args:
        state: The state.
        rule: The damping rule; it is left as it is.
        parameters: The parameters by name.
    """
    Record({**_SCHEMAS, "trust": SlopeTrust.schema(parameters)}).check("'step'", state)
    try:
        deepcopy(rule).load_state_dict(state["rule"])
    except Exception as error:
        raise ValueError(
            f"`state_dict` must have a state of the damping rule {type(rule).__name__} at "
            f"'step'.rule, got {error!r}."
        ) from error

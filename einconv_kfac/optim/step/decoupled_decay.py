"""Weight decay that is no part of the objective, after an automatic step."""

from __future__ import annotations

import torch

from einconv_kfac.optim.step.in_place import add_, scale_
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction


def decay_(objective: Objective, update: Direction) -> None:
    """Shrink what the parameters were before a step by their learning rates times weight decays.

    The result is that of shrinking first, as AdamW does. The step itself is compared without it.

    Args:
        objective: The objective; its parameters are those after the step.
        update: The step.
    """
    own = {n: objective.rates[n] * objective.by_parameter[n].weight_decay for n in update}
    names = [name for name, share in own.items() if share]
    if not names:
        return
    parameters = [objective.parameters[name] for name in names]
    scale_(parameters, [1 - own[name] for name in names])
    add_(parameters, torch._foreach_mul([update[n] for n in names], [own[n] for n in names]))

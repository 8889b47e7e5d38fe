"""Shifts of frozen layers, which no node of a graph keeps.

A layer without trained parameters has no edge to its shift, and its node saves the weight alone.
The shift stands beside it among the parameters of the module that has this weight.
"""

from __future__ import annotations

import gc

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

_SHIFTS: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""The shift of each frozen weight that was asked for."""


def frozen_shift(weight: Tensor | None) -> Tensor | None:
    """Return the shift of the layer that has a frozen weight, or ``None`` if none is found.

    The objects that refer to the weight are looked through once. A layer that shares the weight
    may have another shift, so that what follows from it has to be compared with what is known.

    Args:
        weight: The weight, or a view of all of it, as a graph saved it.
    """
    own = weight if weight is None or weight._base is None else weight._base
    if not isinstance(own, nn.Parameter) or own.requires_grad:
        return None
    if own not in _SHIFTS:
        owners = [each for each in gc.get_referrers(own) if isinstance(each, dict)]
        shifts = [each.get("bias") for each in owners if each.get("weight") is own]
        _SHIFTS[own] = next((s for s in shifts if isinstance(s, Tensor)), None)
    found = _SHIFTS[own]
    return None if found is None or found.requires_grad else found.detach()

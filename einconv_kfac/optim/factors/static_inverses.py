"""Inverses whose tensors stay where they are, for CUDA graphs that read them there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.protocol import LayerInverse
from einconv_kfac.optim.inverses.registry import kinds


def present_inverses(layers: Mapping[str, RunningFactors]) -> dict[str, LayerInverse]:
    """Return the inverse of each layer that has one, by name."""
    return {name: own.inverse for name, own in layers.items() if own.inverse is not None}


def keep_memory_(
    layers: Mapping[str, RunningFactors], before: Mapping[str, LayerInverse]
) -> tuple[list[Tensor], list[Tensor]]:
    """Make layers use the memory of their inverses before a step for those after it.

    Inverses of another form or on another device keep their own memory; what was captured before is
    to be captured anew.

    Args:
        layers: The layers.
        before: The inverses before the step.

    Returns:
        Tensors to overwrite, and what is to be copied there before the inverses are used again.
    """
    targets, values = [], []
    for name, earlier in before.items():
        running, present = layers[name], layers[name].inverse
        if present is None or present is earlier or present.kind != earlier.kind:
            continue
        old, new = earlier.state_dict(), present.state_dict()
        keys = [key for key, value in new.items() if isinstance(value, Tensor)]
        if not all(_fits(new[key], old.get(key)) for key in keys):
            continue
        state = {**new, **{key: old[key] for key in keys}}
        running.inverse = kinds()[state.pop("kind")].load(state, running.layer.layout)
        changed = [key for key in keys if new[key] is not old[key]]
        targets += [old[key] for key in changed]
        values += [new[key] for key in changed]
    return targets, values


def _fits(value: Tensor, memory: object) -> bool:
    """Return whether a tensor can be copied to the memory of another."""
    if not isinstance(memory, Tensor):
        return False
    forms = [(own.shape, own.dtype, own.device) for own in (value, memory)]
    return forms[0] == forms[1]

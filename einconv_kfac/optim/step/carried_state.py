"""State that travels as tensors among the states of parameters.

`torch.distributed.checkpoint.state_dict` keeps states of parameters and parameter groups, and drops
everything else. Nested containers are therefore also saved in the state of the first parameter that
has one: each tensor as it is, and all the rest as one tensor of bytes, in JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

CARRIED = "kfac"
"""Key of the bytes; those of the tensors are this, a point and a number."""


def carry_(memory: dict[Any, dict[str, Any]], part: dict[str, Any]) -> None:
    """Add nested containers to the state of the first parameter, which is replaced.

    Args:
        memory: States by parameter.
        part: Containers of tensors, numbers, texts and ``None``. Those of other contents, which
            a damping rule may have, are not carried.
    """
    leaves, structure = _pytree.tree_flatten(part)
    tensors = {f"{CARRIED}.{i}": leaf for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)}
    others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    try:
        text = json.dumps([_pytree.treespec_dumps(structure), others])
    except (TypeError, NotImplementedError):
        return
    contents = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    for key, own in list(memory.items())[:1]:
        memory[key] = {**own, CARRIED: contents, **tensors}


def taken_out(memory: Any) -> tuple[Any, Any]:
    """Return what `carry_` added, or ``None``, and the states of parameters without it.

    Args:
        memory: States by parameter, or something else, which is returned.
    """
    if not isinstance(memory, Mapping):
        return None, memory
    part, known = None, {}
    for key, own in memory.items():
        known[key] = own
        if isinstance(own, Mapping) and CARRIED in own:
            known[key] = {n: value for n, value in own.items() if not _is_carried(n)}
            part = _unpacked(own)
    return part, known


def _is_carried(name: Any) -> bool:
    return isinstance(name, str) and name.partition(".")[0] == CARRIED


def _unpacked(own: Mapping[str, Any]) -> Any:
    """Return the containers that one state carries, or ``None`` if they cannot be read."""
    try:
        structure, leaves = json.loads(bytes(own[CARRIED].tolist()))
        tensors = {index: own.get(f"{CARRIED}.{index}") for index in range(len(leaves))}
        values = [leaf if tensors[i] is None else tensors[i] for i, leaf in enumerate(leaves)]
        return _pytree.tree_unflatten(values, _pytree.treespec_loads(structure))
    except (AttributeError, TypeError, ValueError):
        return None

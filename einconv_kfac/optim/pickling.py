"""Copies by ``deepcopy`` and ``pickle``, from constructor arguments and state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

NONE: Mapping[str, Any] = MappingProxyType({})


def rebuilt(
    kind: Callable[..., Any],
    given: dict[str, Any],
    state: dict[str, Any],
    attributes: Mapping[str, Any] = NONE,
) -> Any:
    """Return a copy, from the arguments of its constructor, its state and other attributes."""
    made = kind(**given)
    vars(made).update(attributes)
    made.load_state_dict(state)
    return made


def temporary_tensors(state: dict[str, Any]) -> list[Tensor]:
    """Return the tensors of a state that nothing else holds: the bytes among them.

    `torch.multiprocessing` sends file descriptors of tensors to a process that is spawned. Of a
    tensor that is gone before it has started, the descriptor is closed and used for another file.
    """
    leaves = _pytree.tree_leaves(state)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype == torch.uint8]

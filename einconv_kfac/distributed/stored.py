"""Which parameters an optimizer has, and which tensors the graphs of a model end in.

They are the same, except in a model that `fully_shard` divides: each worker stores some rows of a
parameter as a DTensor, and the calls of the model use a whole one, which torch keeps for all calls.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

P = TypeVar("P", bound=Tensor)

_LEAVES = WeakIdKeyDictionary()
_STORED = WeakIdKeyDictionary()


def pair_(stored: nn.Parameter, leaf: nn.Parameter) -> None:
    """Pair the parameter that an optimizer has with the whole one that calls use."""
    _LEAVES[stored] = weakref.ref(leaf)
    _STORED[leaf] = weakref.ref(stored)


def graph_leaf(parameter: P) -> P:
    """Return the tensor that stands for a parameter in the graphs of calls."""
    return _other(_LEAVES, parameter)


def graph_leaves(parameters: Iterable[P]) -> list[P]:
    """Return `graph_leaf` of each of many parameters; where no model is divided, these."""
    return [graph_leaf(own) for own in parameters] if _LEAVES.data else list(parameters)


def leaf_names(model: nn.Module) -> dict[Tensor, str]:
    """Return the names of a model's parameters, by `graph_leaf`."""
    return {graph_leaf(p): name for name, p in model.named_parameters()}


def stored_of(parameter: P) -> P:
    """Return the parameter that an optimizer has of one that the model has at present."""
    return _other(_STORED, parameter)


def all_stored(parameters: Iterable[P]) -> list[P]:
    """Return `stored_of` each of many parameters; where no model is divided, these."""
    return [stored_of(own) for own in parameters] if _STORED.data else list(parameters)


def local_of(tensor: Tensor) -> Tensor:
    """Return this worker's rows of a tensor; all of one that is not divided."""
    if not is_divided(tensor):
        return tensor
    with torch.no_grad():
        rows: Tensor = tensor.to_local()  # type: ignore[attr-defined]
        return rows.detach()


def is_divided(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor."""
    return type(tensor).__name__ == "DTensor"


def check_still_whole(model: nn.Module) -> None:
    """Raise a ``RuntimeError`` if a model was divided since its optimizer was made.

    Args:
        model: The model, whose parameters were whole.
    """
    for name, parameter in model.named_parameters():
        if is_divided(parameter):
            raise RuntimeError(
                f"The parameters of `model` must stay whole tensors, got a DTensor for '{name}' "
                "since the optimizer was made (`parallelize_module`, `distribute_module`). Tensor "
                "parallelism is not supported: wrap the model in DistributedDataParallel, or call "
                "`fully_shard` on its layers and on itself, and then make the optimizer."
            )


def _other(pairs: WeakIdKeyDictionary, parameter: P) -> P:
    """Return the other one of a pair, or the parameter itself where there is none."""
    if not pairs.data or parameter not in pairs:
        return parameter
    other: P | None = pairs[parameter]()
    return parameter if other is None else other

"""The kinds of inverses: every file of this folder that defines ``KIND``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import choice, shown
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.optim import inverses
from einconv_kfac.optim.inverses.protocol import Kind, LayerInverse


@cache
def kinds() -> dict[str, Kind]:
    """Return the kinds of inverses by name."""
    names = [module.name for module in iter_modules(inverses.__path__)]
    modules = [import_module(f"{inverses.__name__}.{name}") for name in names]
    found: list[Kind] = [module.KIND for module in modules if hasattr(module, "KIND")]
    return {kind.name: kind for kind in found}


def kind_of(inverse: str, fisher: str) -> Kind:
    """Return the kind of inverse with a name.

    Args:
        inverse: The name.
        fisher: Which Fisher the factors are of.

    Raises:
        ValueError: If there is no such kind, or the kind needs gradients and the Fisher has none.
    """
    kind = kinds()[choice("inverse", inverse, tuple(kinds()))]
    if kind.needs_per_example_gradients and fisher == "forward-only":
        raise ValueError(
            f"`fisher` must have gradients for inverse={inverse!r}, got 'forward-only'. Pass "
            "another `fisher`, or inverse='exact'."
        )
    return kind


def check_inverse(
    path: str, state: Any, kind: Kind, layout: Layout, shapes: Sequence[Sequence[int]]
) -> None:
    """Raise a ``ValueError`` if no inverse of a layer can be made of a state.

    Args:
        path: Where the state is, for the error.
        state: A `LayerInverse.state_dict`.
        kind: The kind of inverse.
        layout: The layer's parameters.
        shapes: The shapes of its factors.
    """
    if not shapes:
        raise ValueError(f"`state_dict` must have factors where there is an inverse, at {path}.")
    if kind.schema is not None:
        kind.schema(layout, shapes).check(path, state)
        return
    if not isinstance(state, Mapping) or state.get("kind") != kind.name:
        raise ValueError(f"`state_dict` must have an inverse at {path}, got {shown(state)}.")
    try:
        inverse_of(dict(state), layout, torch.device("cpu"))
    except Exception as error:
        raise ValueError(f"`state_dict` must have an inverse at {path}, got {error!r}.") from error


def with_own_tensors(inverse: LayerInverse, layout: Layout) -> LayerInverse:
    """Return an inverse whose tensors are views of nothing, as those of a loaded state are.

    Products of equal matrices may differ in the last bits where one is aligned differently.

    Args:
        inverse: The inverse.
        layout: The layer's parameters.
    """
    state = inverse.state_dict()
    tensors = [value for value in state.values() if isinstance(value, Tensor)]
    if all(is_whole(tensor) for tensor in tensors):
        return inverse
    return inverse_of(state, layout, tensors[0].device)


def is_whole(tensor: Tensor) -> bool:
    """Return whether a tensor fills its storage."""
    size = tensor.numel() * tensor.element_size()
    return tensor.storage_offset() == 0 and tensor.untyped_storage().nbytes() == size


def inverse_of(state: dict[str, Any], layout: Layout, device: torch.device) -> LayerInverse:
    """Return the inverse that a state describes, with tensors of its own.

    Args:
        state: A `LayerInverse.state_dict`.
        layout: The layer's parameters.
        device: The device of the inverse.
    """
    own: dict[str, Any] = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    return kinds()[own.pop("kind")].load(own, layout)

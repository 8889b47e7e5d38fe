"""The kinds of inverses: every file of this folder that defines ``KIND``."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

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
    if inverse not in kinds():
        raise ValueError(f"`inverse` must be one of {tuple(kinds())}, got {inverse!r}.")
    kind = kinds()[inverse]
    if kind.needs_per_example_gradients and fisher == "forward-only":
        raise ValueError(
            f"`fisher` must have gradients for inverse={inverse!r}, got 'forward-only'. Pass "
            "another `fisher`, or inverse='exact'."
        )
    return kind


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

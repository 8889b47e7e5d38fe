"""Temporary replacement of the forward methods of a model's modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

Substitute: TypeAlias = Callable[[nn.Module], Callable[..., Any] | None]
"""Returns the forward method to use for a module, or ``None`` to keep the module's own."""


@contextmanager
def substituted(model: nn.Module, substitutes: Sequence[Substitute]) -> Iterator[None]:
    """Replace the forward methods of modules inside the block.

    Modules on which somebody else has replaced the method are left alone.

    Args:
        model: The model.
        substitutes: At most one of them may apply to a module.
    """
    changed = []
    try:
        for module in model.modules():
            if "forward" in vars(module):
                continue
            for substitute in substitutes:
                if (forward := substitute(module)) is not None:
                    vars(module)["forward"] = forward
                    changed.append(module)
        yield
    finally:
        for module in changed:
            del module.forward

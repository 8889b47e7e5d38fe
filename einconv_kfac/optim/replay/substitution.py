"""Temporary replacement of the forward methods of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

from torch import nn

Forwards: TypeAlias = dict[nn.Module, Callable[..., Any]]
"""Forward methods by module."""


@contextmanager
def substituted(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of modules inside the block.

    Modules on which the method has already been replaced are left alone.
    """
    changed = [module for module in forwards if "forward" not in vars(module)]
    for module in changed:
        vars(module)["forward"] = forwards[module]
    try:
        yield
    finally:
        for module in changed:
            del module.forward

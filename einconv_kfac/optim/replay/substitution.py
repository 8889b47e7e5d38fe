"""Temporary replacement of the forward methods of modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeAlias

from torch import nn

Forwards: TypeAlias = dict[nn.Module, Callable[..., Any]]
"""Forward methods by module."""


class _Substitute:
    """A forward method of one module; copies of the module have its ordinary one.

    Args:
        module: The module.
        forward: The method.
    """

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        self._module, self._forward = module, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _ordinary_forward, (self._module,)


def _ordinary_forward(module: nn.Module) -> MethodType:
    """Return the forward method of a module's class."""
    return MethodType(type(module).forward, module)


@contextmanager
def substituted(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward methods of modules inside the block.

    Modules on which the method has already been replaced are left alone.
    """
    changed = [module for module in forwards if "forward" not in vars(module)]
    for module in changed:
        vars(module)["forward"] = _Substitute(module, forwards[module])
    try:
        yield
    finally:
        for module in changed:
            del module.forward

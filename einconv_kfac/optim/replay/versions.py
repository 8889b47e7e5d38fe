"""Tensors that must not change between a forward pass and the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

from torch import Tensor, nn

State: TypeAlias = tuple[tuple[int, int], ...]
"""Version and address of each of several tensors."""


class Versions:
    """The versions of tensors, by which operations in place are found.

    Args:
        named: Tensors with what they are.
    """

    def __init__(self, named: Iterable[tuple[str, object]]) -> None:
        self._known = [
            (name, tensor, tensor._version)
            for name, tensor in named
            if isinstance(tensor, Tensor) and not tensor.is_inference()
        ]

    @staticmethod
    def known(tensors: Iterable[tuple[str, Tensor, int]]) -> Versions:
        """Return tensors with the versions that they had."""
        found = Versions(())
        found._known = list(tensors)
        return found

    def changed(self) -> str | None:
        """Return what was changed in place, or ``None``."""
        return next((n for n, tensor, version in self._known if tensor._version != version), None)


def state_of(parameters: Iterable[nn.Parameter]) -> State:
    """Return the state of parameters, which differs after every change of a value."""
    return tuple((parameter._version, parameter.data_ptr()) for parameter in parameters)

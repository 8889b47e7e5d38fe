"""Tensors that must not change between a forward pass and the step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import all_stored, is_divided, local_of

State: TypeAlias = tuple[tuple[object, ...], ...]
"""Version and address of each of several tensors."""


class _Rows:
    """The rows that a worker stores of a parameter, whose version does not tell of changes.

    Args:
        rows: The rows.
    """

    def __init__(self, rows: Tensor) -> None:
        self._norm = torch.linalg.vector_norm(rows.double()) if rows.numel() else rows

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and torch.equal(self._norm, other._norm)

    __hash__ = None  # type: ignore[assignment]


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
    return tuple(
        (p._version, _Rows(local_of(p)) if is_divided(p) else p.data_ptr())
        for p in all_stored(parameters)
    )

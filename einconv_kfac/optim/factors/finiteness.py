"""Whether the numbers of a step are finite: one number, which the host may read with others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class NotFiniteError(Exception):
    """A gradient, loss or Kronecker factor is not finite."""


class Finiteness:
    """Whether tensors are finite.

    A tensor is finite where its norm or sum is. Entries are looked at one by one only if one is
    not, since a norm may overflow.

    Args:
        tensors: The tensors.
        numbers: Norms or sums of all of them, on one device.

    Attributes:
        is_known: Whether the tensors are known to be finite.
        is_late: Whether the host is to find out after the step.
    """

    def __init__(self, tensors: Sequence[Tensor], numbers: Sequence[Tensor]) -> None:
        self._tensors, self._numbers = tensors, numbers
        self.is_known = self.is_late = False

    @cached_property
    def flag(self) -> Tensor:
        """Whether all norms and sums are finite, one number on the device."""
        if not self._numbers:
            return torch.ones((), dtype=torch.bool)
        numbers = torch.stack(list(self._numbers))
        return (numbers - numbers == 0).all()

    def confirm_(self, flag: float) -> None:
        """Take over the flag, which the host has read.

        Raises:
            NotFiniteError: If a tensor is not finite.
        """
        if not (flag or bool(self.by_entry())):
            raise NotFiniteError
        self.is_known = True

    def require_(self) -> None:
        """Read the flag, unless it is known.

        Raises:
            NotFiniteError: If a tensor is not finite.
        """
        if not self.is_known:
            self.confirm_(bool(self.flag))

    def be_late_(self) -> None:
        """Let the device decide by the flag, that of largest entries, which do not overflow.

        It is called before the flag was asked for.
        """
        self._numbers = torch._foreach_norm([t for t in self._tensors if t.numel()], math.inf)
        self.is_late = True

    def by_entry(self) -> Tensor:
        """Return whether every entry is finite."""
        return torch.stack([tensor.isfinite().all() for tensor in self._tensors]).all()


KNOWN = Finiteness((), ())
"""Of nothing."""
KNOWN.is_known = True

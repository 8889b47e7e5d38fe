"""Whether the numbers of a step are finite: one number, which the host may read with others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.stream_capture import is_capturing
from einconv_kfac.optim.vectors import totals

NOT_FINITE = "{} was not finite; the step was skipped."


class NotFiniteError(Exception):
    """A gradient, loss or Kronecker factor is not finite; the message says which."""


class Finiteness:
    """Whether tensors are finite.

    A tensor is finite where its norm or sum is. Entries are looked at one by one only if one is
    not, since a norm may overflow.

    Args:
        named: The tensors, by what they are.
        numbers: Returns norms or sums of them, on one device.
        summed: Those whose sums are taken together.

    Attributes:
        is_known: Whether the tensors are known to be finite.
        is_late: Whether the host is to find out after the step.
    """

    def __init__(
        self,
        named: Mapping[str, Sequence[Tensor]],
        numbers: Callable[[], Sequence[Tensor]] = list,
        summed: Sequence[Tensor] = (),
    ) -> None:
        self._named, self._numbers, self._summed = named, numbers, summed
        self._flags: dict[torch.dtype, Tensor] = {}
        self.is_known = self.is_late = False

    @cached_property
    def numbers(self) -> Tensor:
        """The numbers as a vector."""
        found = [*self._numbers(), *(totals(self._summed) if self._summed else ())]
        return torch.stack(found) if found else torch.zeros(1)

    @cached_property
    def flag(self) -> Tensor:
        """Whether all norms and sums are finite, one number on the device."""
        largest: Tensor = torch.linalg.vector_norm(self.numbers, math.inf)
        return largest < math.inf

    def flag_as(self, dtype: torch.dtype) -> Tensor:
        """Return the flag as a number of a data type."""
        if dtype not in self._flags:
            self._flags[dtype] = self.flag.to(dtype)
        return self._flags[dtype]

    def confirm_(self, flag: float) -> None:
        """Take over the flag, which the host has read.

        Raises:
            NotFiniteError: If a tensor is not finite.
        """
        if not flag and (fault := self.fault(self.by_entry().tolist())) is not None:
            raise NotFiniteError(fault)
        self.is_known = True

    def require_(self) -> None:
        """Read the numbers, unless they are known to be finite.

        Raises:
            NotFiniteError: If a tensor is not finite.
        """
        if not self.is_known:
            self.confirm_(all(map(math.isfinite, self.numbers.tolist())))

    @contextmanager
    def before_errors(self) -> Iterator[None]:
        """Have a number that is not finite be the fault of what else fails inside the block."""
        try:
            yield
        except (RuntimeError, ValueError):
            if not is_capturing():
                self.require_()
            raise

    def be_late_(self) -> None:
        """Let the device decide by the largest entry of each tensor, which does not overflow.

        It is called before the flag was asked for.
        """
        self._named = {
            name: found for name, own in self._named.items() if (found := _with_entries(own))
        }
        self._numbers, self._summed = lambda: torch._foreach_norm(self._tensors(), math.inf), ()
        self.is_late = True

    def names(self) -> list[str]:
        """Return what each tensor is."""
        return [name for name, own in self._named.items() for _ in own]

    def fault(self, flags: Iterable[float]) -> str | None:
        """Return what the first tensor is that is not finite, or ``None``.

        Args:
            flags: Whether each tensor is finite.
        """
        return next((name for name, own in zip(self.names(), flags) if not own), None)

    def by_entry(self) -> Tensor:
        """Return whether all entries of each tensor are finite."""
        return torch.stack([tensor.isfinite().all() for tensor in self._tensors()])

    def _tensors(self) -> list[Tensor]:
        return [tensor for own in self._named.values() for tensor in own]


def _with_entries(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors that have entries."""
    return [tensor for tensor in tensors if tensor.numel()]


KNOWN = Finiteness({})
"""Of nothing."""
KNOWN.is_known = True

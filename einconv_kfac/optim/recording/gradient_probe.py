"""The gradient of one parameter after a backward pass, to compare it with that of a later time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.stored import is_divided, local_of

ENTRIES = 4096
"""Number of entries of a gradient that are compared."""


@dataclass(frozen=True)
class Probe:
    """The gradient of one parameter after a backward pass.

    Args:
        parameter: The parameter.
        gradient: The tensor that ``.grad`` was.
        version: Its version.
        value: A copy of some of its entries.
        is_divided: Whether it is a DTensor, whose version does not tell of changes.
    """

    parameter: nn.Parameter
    gradient: Tensor
    version: int
    value: Tensor
    is_divided: bool

    @staticmethod
    def of(parameter: nn.Parameter, gradient: Tensor) -> Probe:
        """Return the present gradient of a parameter."""
        value = entries_of(gradient).clone()
        return Probe(parameter, gradient, gradient._version, value, is_divided(gradient))

    def is_intact(self, *, is_read: bool) -> bool:
        """Return whether ``.grad`` is the same tensor with the same values.

        Args:
            is_read: Whether a gradient on a processor is read where its version tells of no
                change, as after ``p.grad.data.mul_(c)``. A GPU would have to be waited for.
        """
        if self.parameter.grad is not self.gradient:
            return False
        if self.gradient._version != self.version and not self.is_divided:
            return False
        if self.is_divided or (is_read and self.gradient.is_cpu):
            own = local_of(self.gradient) if self.is_divided else self.gradient
            return torch.equal(_first(own), self.value)
        return True

    def is_cleared(self, *, is_read: bool) -> bool | None:
        """Return whether the gradient was dropped or zeroed; ``None`` if it was zero before.

        Args:
            is_read: See `is_intact`; ``p.grad.data.zero_()`` tells of no change either.
        """
        gradient = self.parameter.grad
        if gradient is None:
            return True
        are_values = self.is_divided or not (is_read and gradient.is_cpu)
        if are_values and self.is_intact(is_read=False):
            return False
        if not bool(self.value.any()):
            return None
        own = local_of(gradient) if self.is_divided else gradient
        return not (bool(_first(own).any()) or bool(own.any()))


def are_intact(probes: Iterable[Probe]) -> bool:
    """Return whether no gradient has changed, as far as the host can tell without waiting."""
    return all(probe.is_intact(is_read=True) for probe in probes)


def are_cleared(probes: Iterable[Probe], *, are_read: bool) -> bool:
    """Return whether all gradients were dropped or zeroed; none was, where all were zero.

    Args:
        probes: The gradients.
        are_read: See `Probe.is_cleared`.
    """
    answers = {probe.is_cleared(is_read=are_read) for probe in probes}
    return True in answers and False not in answers


def entries_of(gradient: Tensor) -> Tensor:
    """Return entries of a gradient, as real numbers."""
    return _first(local_of(gradient).detach())


def _first(own: Tensor) -> Tensor:
    """Return the first entries of a tensor, as real numbers."""
    own = own if own.numel() <= ENTRIES else own.flatten()[:ENTRIES]
    return torch.view_as_real(own) if own.is_complex() else own


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return the entries of tensors as one vector in float64."""
    found = [tensor.flatten().double() for tensor in tensors]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64, device="cpu")

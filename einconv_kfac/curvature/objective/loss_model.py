"""A loss as a function of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.losses import local_expansion


class Expansion(NamedTuple):
    """The second-order expansion of a loss along tangents of a model's outputs.

    Args:
        slope: The derivative of the loss along each tangent, ``[m]`` in float64.
        curvature: The Gauss-Newton matrix between them, ``[m, m]`` in float64.
    """

    slope: Tensor
    curvature: Tensor


class LossModel(Protocol):
    """A loss that can be evaluated and differentiated again at a model's outputs."""

    def value(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the loss for other values of the outputs, ``[n, ...]`` each."""

    def slopes(self) -> Sequence[Tensor | None]:
        """Return the derivative of the loss by each recorded output; ``None`` for zero."""

    def expansion(self, tangents: Sequence[Sequence[Tensor | None]]) -> Expansion:
        """Return the expansion at the recorded outputs.

        Args:
            tangents: For each direction, the tangent of each output; ``None`` for zero.
        """

    def at(self, outputs: Sequence[Tensor]) -> LossModel:
        """Return the same with the outputs of the recorded pass, where those at hand changed."""

    def unknown(self) -> Sequence[str]:
        """Return the names of operations because of which `value` cannot be computed."""


class GivenLoss:
    """A loss module on one output of a model.

    Args:
        loss_fn: The loss.
        output: The output in the recorded pass, ``[n, ...]``, detached.
        targets: The other arguments of the loss.
    """

    def __init__(self, loss_fn: nn.Module, output: Tensor, targets: Sequence[Any]) -> None:
        self.loss_fn = loss_fn
        self.targets = tuple(targets)
        self._output = output

    def value(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        loss: Tensor = self.loss_fn(outputs[0], *self.targets)
        return loss

    def slopes(self) -> Sequence[Tensor]:
        """See `LossModel`."""
        return (local_expansion(self.loss_fn, self._output, self.targets, ()).gradient,)

    def expansion(self, tangents: Sequence[Sequence[Tensor | None]]) -> Expansion:
        """See `LossModel`."""
        zero = torch.zeros_like(self._output)
        own = [zero if t is None else t for (t,) in tangents]
        slope, products = local_expansion(self.loss_fn, self._output, self.targets, own)
        left = torch.stack(own).flatten(1).double()
        slopes = left @ slope.flatten().double()
        return Expansion(slopes, left @ torch.stack(products).flatten(1).double().T)

    def at(self, outputs: Sequence[Tensor]) -> GivenLoss:
        """See `LossModel`."""
        return GivenLoss(self.loss_fn, outputs[0], self.targets)

    def unknown(self) -> Sequence[str]:
        """See `LossModel`."""
        return ()

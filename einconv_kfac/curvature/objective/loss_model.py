"""A loss as a function of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.losses import local_expansion
from einconv_kfac.curvature.losses.loss_call import in_precision, precise_type, targets_in_precision


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

    def precision(self) -> torch.dtype:
        """Return the data type in which changes of the loss are computed."""

    @property
    def has_policies(self) -> bool:
        """Whether the loss is a policy gradient, in whole or in part."""

    def divergence(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return by how much its policies differ for other values of the outputs.

        It is the sum of Kullback-Leibler divergences, and after it their number, ``[2]`` in
        float64.
        """

    def unknown(self) -> Sequence[str]:
        """Return the names of operations because of which `value` cannot be computed."""


class GivenLoss:
    """A loss module on one output of a model.

    It is evaluated in float32 at least: in lower precision the value is rounded by more than it
    changes.

    Args:
        loss_fn: The loss.
        output: The output in the recorded pass, ``[n, ...]``, detached.
        targets: The other arguments of the loss.
        rounding: What the recorded loss was rounded by; ``None`` where it was not.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        output: Tensor,
        targets: Sequence[Any],
        rounding: Tensor | None = None,
    ) -> None:
        self.loss_fn = loss_fn
        self.targets = tuple(targets)
        self._output = output
        self._rounding = rounding

    @staticmethod
    def recorded(
        loss_fn: nn.Module, output: Tensor, targets: Sequence[Any], loss: Tensor
    ) -> GivenLoss:
        """Return the loss of a pass, whose value is the recorded one at the recorded output."""
        found = GivenLoss(loss_fn, output, targets)
        if output.dtype == precise_type(output):
            return found
        with torch.no_grad():
            rounding = loss - found.value([output])
        return GivenLoss(loss_fn, output, targets, rounding)

    def value(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        precise = self.precision()
        loss_fn, targets = self.loss_fn, self.targets
        if precise != self._output.dtype:
            loss_fn, targets = (
                in_precision(loss_fn, precise),
                targets_in_precision(targets, precise),
            )
        loss: Tensor = loss_fn(outputs[0].to(precise), *targets)
        return loss if self._rounding is None else loss + self._rounding

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
        return GivenLoss(self.loss_fn, outputs[0], self.targets, self._rounding)

    def precision(self) -> torch.dtype:
        """See `LossModel`."""
        return precise_type(self._output)

    has_policies = False

    def divergence(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        return self._output.new_zeros(2, dtype=torch.float64)

    def unknown(self) -> Sequence[str]:
        """See `LossModel`."""
        return ()

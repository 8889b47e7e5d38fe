"""Sums over examples from which a layer's Kronecker factors are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.factors.approximation import (
    Approximation,
    second_moment,
    weight_sharing,
    with_ones,
)
from einconv_kfac.curvature.layers.layer import Layer


class Moments(Protocol):
    """Sums over the examples of several batches, for one layer."""

    def add_inputs_(self, calls: Sequence[LayerCall], examples: int | None = None) -> None:
        """Add the inputs of one batch.

        Args:
            calls: All calls of the layer on which the loss of this batch depends.
            examples: The number of examples that each call represents, if it is not the size of
                its input.
        """

    def add_gradients_(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """Add the gradients of one batch along one root vector, after `add_inputs_`.

        Args:
            calls: See `add_inputs_`.
            gradients: For each call, the gradient at its output.
            scale: Factor of the outer products of the gradients.
        """


class LayerMoments:
    """Second moments of a layer's inputs and output gradients, summed over batches.

    Args:
        layer: The layer.
        approximation: ``"expand"`` or ``"reduce"``.
    """

    def __init__(self, layer: Layer, approximation: Approximation) -> None:
        self.layer = layer
        self.approximation = approximation
        self._sharing = weight_sharing(approximation)
        self.examples = 0
        self._terms = 0
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None

    @torch.no_grad()
    def add_inputs_(self, calls: Sequence[LayerCall], examples: int | None = None) -> None:
        """See `Moments`."""
        self.examples += calls[0].x.shape[0] if examples is None else examples
        for group in self._sharing.joined(calls):
            size = batch_size(self.layer, group) if examples is None else examples
            self._terms += self._sharing.term_count(size, sum(self._positions(group)))
            self._inputs = self._input_factor(group, **_into(self._inputs, size))

    @torch.no_grad()
    def add_gradients_(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """See `Moments`."""
        pairs = list(zip(calls, gradients))
        for group in self._sharing.joined(pairs):
            self._outputs = self._output_factor(group, scale)

    def sums(self) -> list[Tensor]:
        """Return the sums of the factors that were added."""
        return [total for total in (self._inputs, self._outputs) if total is not None]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A [g, d, d]`` and ``B [g, co, co]``, averaged over what was added.

        Without gradients, as for a forward-only Fisher, ``B`` is the identity.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._inputs is None:
            raise no_data(self.layer)
        a = self._inputs / self.examples
        if self._outputs is None:
            groups, channels, _ = self.layer.layout.shape
            eye = torch.eye(channels, dtype=a.dtype, device=a.device)
            return a, eye.repeat(groups, 1, 1)
        return a, self._outputs / self._terms

    def _positions(self, calls: Sequence[LayerCall]) -> list[int]:
        """Return the number of positions of each call."""
        return [self.layer.rule.positions(call.module, call.y_shape) for call in calls]

    def _input_factor(self, calls: Sequence[LayerCall], **into: Any) -> Tensor:
        """Return ``A`` of calls whose positions are averaged together, added to a sum."""
        rule, bias = self.layer.rule, self.layer.bias is not None
        if len(calls) == 1:
            (call,) = calls
            shapes = call.module, call.x, call.y_shape
            return rule.input_factor(*shapes, self.approximation, bias, **into)
        sums = [rule.inputs(c.module, c.x, c.y_shape).sum(-1, keepdim=True) for c in calls]
        mean = torch.stack(sums).sum(0) / sum(self._positions(calls))  # [n, g, d, 1]
        columns = with_ones(mean) if bias else mean
        return second_moment(columns, batch_size(self.layer, calls), **into)

    def _output_factor(self, calls: Sequence[tuple[LayerCall, Tensor]], scale: float) -> Tensor:
        """Return the sum of ``scale * g g^T`` over calls whose positions are summed together."""
        rule = self.layer.rule
        if len(calls) == 1:
            ((call, gradient),) = calls
            (positions,) = self._positions([call])
            count = self._sharing.term_count(gradient.shape[0], positions)
            into = _into(self._outputs, scale * count)
            return rule.output_factor(call.module, gradient, self.approximation, **into)
        sums = [rule.outputs(call.module, g).sum(-1, keepdim=True) for call, g in calls]
        return second_moment(torch.stack(sums).sum(0), 1, **_into(self._outputs, scale))


def no_data(layer: Layer) -> RuntimeError:
    """Return the error for a layer on which no loss depended."""
    return RuntimeError(
        f"Factors of '{layer.name}' need data, got none: there was no batch with a target that "
        "counts, or the loss of none depends on it through calls that record gradients."
    )


def batch_size(layer: Layer, calls: Sequence[LayerCall]) -> int:
    """Return the number of examples of a layer's calls.

    Raises:
        ValueError: If the calls differ in it.
    """
    sizes = sorted({call.x.shape[0] for call in calls})
    if len(sizes) > 1:
        raise ValueError(
            f"All calls of '{layer.name}' must have the same number of examples, got {sizes}."
        )
    return sizes[0]


def _into(total: Tensor | None, weight: float) -> dict[str, Any]:
    """Return the keywords that add ``weight`` times a factor to a sum."""
    if total is None:
        return {"alpha": float(weight)}
    return {"out": total, "beta": 1.0, "alpha": float(weight)}

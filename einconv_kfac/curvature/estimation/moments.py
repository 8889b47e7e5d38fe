"""Sums over examples from which a layer's Kronecker factors are averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.layers.layer import Approximation, Layer
from einconv_kfac.curvature.layers.rules.rule import second_moment, with_ones


class Moments(Protocol):
    """What an estimator adds batches to, for one layer."""

    def add_inputs_(self, calls: Sequence[LayerCall]) -> None:
        """Add the inputs of one batch: all calls of the layer that the loss depends on."""

    def add_gradients_(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """Add the outer products, times ``scale``, of gradients at the calls' outputs.

        One root vector's gradients at a time, after `add_inputs_`.
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
        self.examples = 0
        self._terms = 0
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None

    @torch.no_grad()
    def add_inputs_(self, calls: Sequence[LayerCall], examples: int | None = None) -> None:
        """See `Moments`.

        Args:
            calls: The calls.
            examples: The number of examples that each call stands for, if that is not its own.
        """
        rule, bias = self.layer.rule, self.layer.bias is not None
        positions = [rule.positions(call.module, call.y_shape) for call in calls]
        self.examples += calls[0].x.shape[0] if examples is None else examples
        if self.approximation == "reduce" and len(calls) > 1:
            size = batch_size(self.layer, calls)
            examples = size if examples is None else examples
            self._terms += examples
            sums = [rule.inputs(c.module, c.x, c.y_shape).sum(-1, keepdim=True) for c in calls]
            mean = torch.stack(sums).sum(0) / sum(positions)  # [n, g, d, 1]
            columns = with_ones(mean) if bias else mean
            self._inputs = second_moment(columns, size, **_into(self._inputs, examples))
            return
        for call, shared in zip(calls, positions):
            n = call.x.shape[0] if examples is None else examples
            self._terms += n if self.approximation == "reduce" else n * shared
            self._inputs = rule.input_factor(
                call.module,
                call.x,
                call.y_shape,
                self.approximation,
                bias,
                **_into(self._inputs, n),
            )

    @torch.no_grad()
    def add_gradients_(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """See `Moments`."""
        rule, reduce = self.layer.rule, self.approximation == "reduce"
        if reduce and len(calls) > 1:
            sums = [
                rule.outputs(c.module, g).sum(-1, keepdim=True) for c, g in zip(calls, gradients)
            ]
            total = torch.stack(sums).sum(0)
            self._outputs = second_moment(total, 1, **_into(self._outputs, scale))
            return
        for call, gradient in zip(calls, gradients):
            terms = gradient.shape[0]
            terms *= 1 if reduce else rule.positions(call.module, call.y_shape)
            into = _into(self._outputs, scale * terms)
            self._outputs = rule.output_factor(call.module, gradient, self.approximation, **into)

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


def no_data(layer: Layer) -> RuntimeError:
    """Return the error of a layer that no loss depended on."""
    return RuntimeError(
        f"Factors of '{layer.name}' need data, got none: there was no batch, or the loss of "
        "none depends on it through calls that record gradients."
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

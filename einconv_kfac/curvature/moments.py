"""Sums over examples from which a layer's Kronecker factors are averaged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einconv_kfac.curvature.layers import Approximation, Layer


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
        self._positions = 0
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None

    @torch.no_grad()
    def add_(self, xs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """Add one batch: the inputs ``[n, ...]`` of each call and its gradients ``[v, *y]``.

        The gradients are per example and summed over ``v`` (see `losses`).

        Raises:
            NotImplementedError: If the layer was called several times and positions are
                reduced before the product.
        """
        if self.approximation == "reduce" and len(xs) > 1:
            raise NotImplementedError(
                f"approximation='reduce' takes layers that are called once per forward pass, "
                f"got {len(xs)} calls of '{self.layer.name}'. approximation='expand' takes them."
            )
        for x, gradient in zip(xs, gradients):
            self._add_call_(x, gradient)
        self.examples += xs[0].shape[0]

    def _add_call_(self, x: Tensor, gradient: Tensor) -> None:
        """Add one call."""
        layer, rule = self.layer, self.layer.rule
        terms = examples = x.shape[0]
        if self.approximation == "expand":
            terms *= rule.positions(layer.module, gradient.shape[1:])
        self._inputs = rule.input_factor(
            layer.module,
            x,
            approximation=self.approximation,
            bias=layer.bias is not None,
            **_into(self._inputs, examples),
        )
        self._outputs = rule.output_factor(
            layer.module,
            gradient,
            approximation=self.approximation,
            **_into(self._outputs, terms),
        )
        self._positions += terms

    def sums(self) -> list[Tensor]:
        """Return the sums of the factors that were added."""
        return [total for total in (self._inputs, self._outputs) if total is not None]

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A [g, d, d]`` and ``B [g, co, co]``, averaged over what was added.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self._inputs is None or self._outputs is None:
            raise RuntimeError(f"Factors of '{self.layer.name}' need data, got none.")
        return self._inputs / self.examples, self._outputs / self._positions


def _into(total: Tensor | None, terms: int) -> dict[str, object]:
    """Return the keywords that add ``terms`` times a factor to a sum."""
    if total is None:
        return {"alpha": float(terms)}
    return {"out": total, "beta": 1.0, "alpha": float(terms)}

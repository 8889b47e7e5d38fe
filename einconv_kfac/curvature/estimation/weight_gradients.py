"""Factors from gradients of the weight itself, for weights that are used past their calls."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.capture import shape_of
from einconv_kfac.curvature.estimation.example_layout import only
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.stored import graph_leaf


@dataclass
class WeightSums:
    """Sums of ``G G^T`` and ``G^T G`` over gradients ``G [g, co, d]`` of single examples.

    With ``c`` examples, ``B (x) A`` for ``B = 1/c sum G G^T`` and ``A = sum G^T G / sum |G|^2``
    has the partial traces of the sum of ``vec(G) vec(G)^T``, and so its trace. It is that sum
    where ``co`` or ``d`` is 1, or wherever the sum is a Kronecker product.

    Args:
        rows: The sum of ``G G^T``, ``[g, co, co]``.
        columns: The sum of ``G^T G``, ``[g, d, d]``.
    """

    rows: Tensor | None = None
    columns: Tensor | None = None

    def add_(self, gradient: Tensor, scale: float) -> None:
        """Add ``scale`` times the products of a gradient ``[g, co, d]``."""
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self.rows is None or self.columns is None:
            groups, channels, size = g.shape
            self.rows = g.new_zeros(groups, channels, channels)
            self.columns = g.new_zeros(groups, size, size)
        self.rows.baddbmm_(g, g.mT, alpha=scale)
        self.columns.baddbmm_(g.mT, g, alpha=scale)

    def factors(self, examples: int) -> tuple[Tensor, Tensor]:
        """Return ``A`` and ``B``, averaged over a number of examples."""
        assert self.rows is not None
        assert self.columns is not None
        trace = self.rows.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None]
        return torch.where(trace > 0, self.columns / trace, 0.0), self.rows / examples


def weight_gradients(
    outputs: Sequence[Tensor | GradientEdge],
    roots: Sequence[Tensor],
    layers: Sequence[Layer],
    examples: int | None,
) -> Iterator[Mapping[str, Tensor]]:
    """Yield the gradients ``[g, co, d]`` of layers, by a backward pass for each example.

    Args:
        outputs: Outputs of the model, ``[n, ...]``, or their gradient edges.
        roots: A vector like each output.
        layers: The layers.
        examples: The number ``n`` of examples; ``None`` for one pass of all of them.
    """
    tensors = [{n: graph_leaf(p) for n, p in layer.tensors().items()} for layer in layers]
    parameters = [p for own in tensors for p in own.values()]
    sources: Any = outputs
    for example in range(1 if examples is None else examples):
        masked = roots if examples is None else [only(root, example) for root in roots]
        masked = [root.reshape(shape_of(output)) for output, root in zip(outputs, masked)]
        found = torch.autograd.grad(
            sources, parameters, masked, retain_graph=True, allow_unused=True
        )
        known = iter(
            torch.zeros_like(p) if g is None else _dense(g) for p, g in zip(parameters, found)
        )
        yield {
            layer.name: layer.to_matrix({name: next(known) for name in own})
            for layer, own in zip(layers, tensors)
        }


def _dense(gradient: Tensor) -> Tensor:
    """Return a gradient that may be sparse, as of an embedding in a function."""
    return gradient.to_dense() if gradient.is_sparse else gradient

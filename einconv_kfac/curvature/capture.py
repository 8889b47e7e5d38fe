"""Capture of what a layer's curvature needs: its inputs, and gradients at its outputs.

A forward hook keeps each call's input and the *gradient edge* of its output: the place in
the autograd graph, not the tensor, so that an activation that later overwrites the tensor in
place changes nothing. Gradients are then taken with respect to those edges, which neither
touches ``.grad`` nor computes a weight gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input, its output's shape, and where that sits in the graph."""

    layer: str
    x: Tensor
    y_shape: torch.Size
    output: GradientEdge


class LayerCapture:
    """Records the calls of named layers while it is enabled.

    Args:
        layers: Modules by the name that their calls are recorded under. Several modules may
            share a name if they share their parameters.
    """

    def __init__(self, layers: Sequence[tuple[str, nn.Module]]) -> None:
        self.enabled = True
        self.calls: list[LayerCall] = []
        self._handles = [self._attach(name, module) for name, module in layers]

    def _attach(self, name: str, module: nn.Module) -> RemovableHandle:
        def record(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if self.enabled and torch.is_grad_enabled() and output.requires_grad:
                edge = get_gradient_edge(output)
                self.calls.append(LayerCall(name, inputs[0].detach(), output.shape, edge))

        return module.register_forward_hook(record)

    def take(self) -> list[LayerCall]:
        """Return the calls recorded since the last time, and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        """Remove every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def call_gradients(output: Tensor, roots: Tensor, calls: Sequence[LayerCall]) -> dict[int, Tensor]:
    """Backpropagate root vectors to the outputs of the calls; the graph is kept.

    Args:
        output: Model output or loss, ``[*f]``.
        roots: Vectors ``[v, *f]``.
        calls: Calls of layers.

    Returns:
        For the position of each call that ``output`` depends on, gradients ``[v, *y]`` with
        respect to that call's output ``[*y]``.
    """
    edges = [call.output for call in calls]
    rows = [
        torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)
        for root in roots
    ]
    columns = dict(enumerate(zip(*rows)))
    return {p: torch.stack(column) for p, column in columns.items() if column[0] is not None}

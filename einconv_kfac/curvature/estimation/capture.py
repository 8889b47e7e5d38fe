"""Capture of what a layer's curvature needs: its inputs, and gradients at its outputs.

A forward hook keeps each call's input and the *gradient edge* of its output: the place in
the autograd graph, not the tensor, so that an activation that later overwrites the tensor in
place changes nothing. Gradients are then taken with respect to those edges, which neither
touches ``.grad`` nor computes a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from einconv_kfac.curvature.layers.layer import Layer


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: its input, its output's shape, and where that sits in the graph."""

    layer: str
    module: nn.Module
    x: Tensor
    y_shape: torch.Size
    output: GradientEdge


def ignore(*_: object) -> None:
    """Take what a hook is called with, and do nothing."""


def ignorer() -> Callable[..., None]:
    """Return what copies of a model have in place of a hook."""
    return ignore


class _Record:
    """Records the calls of a module; a copy of it, by ``deepcopy`` or ``pickle``, does not.

    Args:
        capture: Where to record them.
        layer: The layer.
        module: One of its modules.
    """

    def __init__(self, capture: LayerCapture, layer: Layer, module: nn.Module) -> None:
        self._capture = capture
        self._layer = layer
        self._module = module

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if not (self._capture.enabled and torch.is_grad_enabled() and y.requires_grad):
            return
        layer, module = self._layer, self._module
        if not layer.rule.accepts(module, x) or x.shape[0] == 0:
            raise ValueError(
                f"The input of '{layer.name}' ({type(module).__name__}) must be a non-empty batch "
                f"[n, ...], got shape {list(x.shape)}. Add a batch dimension with "
                "`x.unsqueeze(0)`."
            )
        call = LayerCall(layer.name, module, x.detach(), y.shape, get_gradient_edge(y))
        self._capture.calls.append(call)

    def __reduce__(self) -> tuple[Any, ...]:
        return ignorer, ()


class LayerCapture:
    """Records the calls of layers while it is enabled; a context that removes its hooks.

    Args:
        layers: The layers; all modules that share a layer's parameters are recorded under
            its name.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.enabled = True
        self.calls: list[LayerCall] = []
        self._undo: dict[str, list[Callable[[], None]]] = {}
        for layer in layers:
            self.watch(layer)

    def __enter__(self) -> LayerCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def watch(self, layer: Layer) -> None:
        """Record the calls of a layer, instead of one of the same name if there is one."""
        self._remove(layer.name)
        self._undo[layer.name] = [self._watch(layer, module) for module in layer.modules]

    def _remove(self, name: str) -> None:
        """Remove the hooks of a layer."""
        for undo in self._undo.pop(name, []):
            undo()

    def _watch(self, layer: Layer, module: nn.Module) -> Callable[[], None]:
        """Record a module's calls under its layer's name; return what undoes that."""
        return layer.rule.watch(module, _Record(self, layer, module))

    def take(self) -> list[LayerCall]:
        """Return the calls recorded since the last time, and forget them."""
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        """Remove every hook, and forget what was recorded."""
        for name in list(self._undo):
            self._remove(name)
        self.calls.clear()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Record nothing inside the block."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before


def call_gradients(output: Tensor, root: Tensor, calls: Sequence[LayerCall]) -> list[Tensor | None]:
    """Backpropagate a root vector to the outputs of the calls; the graph is kept.

    Args:
        output: Model output or loss, ``[*f]``.
        root: A vector ``[*f]``.
        calls: Calls of layers.

    Returns:
        For each call, the gradient ``[*y]`` with respect to its output ``[*y]``, or ``None``
        if ``output`` does not depend on it.
    """
    edges = [call.output for call in calls]
    return list(torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True))

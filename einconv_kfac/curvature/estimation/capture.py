"""Capture of the calls of layers: their inputs, and gradients at their outputs.

A forward hook keeps each call's input and the *gradient edge* of its output: the node of the
autograd graph, not the tensor, so that an activation may overwrite the tensor in place later.
Gradients are then taken with respect to those edges, which neither changes ``.grad`` nor
computes a weight gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn.modules import module as torch_module

from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.module_hooks import InactiveHook, is_compiling
from einconv_kfac.curvature.objective.graph import Edge, metadata_of, viewed
from einconv_kfac.curvature.objective.unbatched import Batching, LayerOutput

TRACKERS = (
    "torch.utils.module_tracker",
    "torch.distributed._tools.",
    "torch.distributed.tensor.debug.",
)
"""Python modules whose hooks for all modules follow them, as those that count operations."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer.

    Args:
        layer: Name of the layer.
        module: The module that was called, one of the layer's modules.
        x: The input, detached.
        y_shape: Shape of the output.
        output: Gradient edge of the output, or of the whole tensor that it is a view of.
        row_dim: See `LayerRule`.
        is_batch: Whether the input is a batch with at least one example.
        is_unbatched: Whether it was one example without a dimension of examples, which is added in
            `x` and `y_shape`.
        is_own: Whether the output is what the layer itself computed, before hooks of others.
        source: Node of the input in the autograd graph, if it has one.
        has_parameters: Whether the module had its parameters in the call, and no other tensors in
            their place.
    """

    layer: str
    module: nn.Module
    x: Tensor
    y_shape: torch.Size
    output: GradientEdge
    row_dim: int | None = 1
    is_batch: bool = True
    is_unbatched: bool = False
    is_own: bool = True
    source: Node | None = None
    has_parameters: bool = True


def sees_own_output(module: nn.Module) -> bool:
    """Return whether hooks that were attached first saw what the module itself computed.

    A user's hook may change the output after them, but not before.
    """
    first = next(iter(module._forward_hooks.values()), None)
    others = torch_module._global_forward_hooks.values()
    return _module_of(first).startswith("einconv_kfac.") and all(
        _module_of(hook).startswith(TRACKERS) for hook in others
    )


def _module_of(hook: Any) -> str:
    """Return the name of the Python module that defines a hook."""
    return getattr(getattr(hook, "func", hook), "__module__", None) or ""


class _CallRecorder:
    """Records the calls of a module; its copies, by ``deepcopy`` or ``pickle``, do nothing.

    Args:
        capture: Receives the calls.
        layer: The layer.
        module: One of its modules.
    """

    def __init__(self, capture: LayerCapture, layer: Layer, module: nn.Module) -> None:
        self._capture = capture
        self._layer = layer
        self._module = module

    @property
    def is_active(self) -> bool:
        """Whether calls run at present as those that are recorded."""
        return self._capture.runs_recorded and torch.is_grad_enabled()

    def __call__(self, x: Tensor, y: Tensor) -> None:
        if is_compiling():
            return
        if not (self._capture.enabled and torch.is_grad_enabled() and y.requires_grad):
            return
        layer, module = self._layer, self._module
        rule, edge = layer.use_of(module).rule, get_gradient_edge(viewed(y))
        is_own = not module._forward_hooks or sees_own_output(module)
        source = get_gradient_edge(x).node if x.requires_grad else None
        x, y_shape = x.detach(), y.shape
        is_unbatched = not rule.accepts(module, x) and rule.accepts(module, x.unsqueeze(0))
        if is_unbatched:
            x, y_shape = x.unsqueeze(0), torch.Size([1, *y_shape])
        is_batch = x.shape[:1] != (0,) and rule.accepts(module, x)
        call = LayerCall(
            layer.name,
            module,
            x,
            y_shape,
            edge,
            rule.row_dim,
            is_batch,
            is_unbatched,
            is_own,
            source,
            layer.has_parameters(module),
        )
        self._capture.calls.append(call)

    def __reduce__(self) -> tuple[Any, ...]:
        return InactiveHook, ()


class LayerCapture:
    """Records the calls of layers while it is enabled; a context that removes its hooks.

    Args:
        layers: The layers; all modules that share a layer's parameters are recorded under
            its name.

    Attributes:
        enabled: Whether calls are recorded.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.enabled, self._repeats = True, False
        self.calls: list[LayerCall] = []
        self._undo: dict[str, list[Callable[[], None]]] = {}
        for layer in layers:
            self.watch(layer)

    def __enter__(self) -> LayerCapture:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def watch(self, layer: Layer) -> None:
        """Record the calls of a layer; it replaces a watched layer of the same name."""
        self._remove(layer.name)
        self._undo[layer.name] = [self._watch(layer, module) for module in layer.modules]

    def _remove(self, name: str) -> None:
        """Remove the hooks of a layer."""
        for undo in self._undo.pop(name, []):
            undo()

    def _watch(self, layer: Layer, module: nn.Module) -> Callable[[], None]:
        """Record a module's calls under its layer's name; return a function that ends it."""
        rule = layer.use_of(module).rule
        return rule.watch(module, _CallRecorder(self, layer, module))

    def take(self) -> list[LayerCall]:
        """Return the recorded calls, and remove them from `calls`."""
        calls, self.calls = self.calls, []
        return calls

    def remove(self) -> None:
        """Remove every hook and every recorded call."""
        for name in list(self._undo):
            self._remove(name)
        self.calls.clear()

    @property
    def runs_recorded(self) -> bool:
        """Whether layers that take another course where they are recorded take it at present."""
        return self.enabled or self._repeats

    @contextmanager
    def paused(self, repeats: bool = False) -> Iterator[None]:
        """Record nothing inside the block.

        Args:
            repeats: Whether calls take the course of those before, as where a checkpoint makes
                them again: torch compares what both save.
        """
        before = self.enabled, self._repeats
        self.enabled, self._repeats = False, repeats and self.runs_recorded
        try:
            yield
        finally:
            self.enabled, self._repeats = before


def outputs_of(calls: Iterable[LayerCall]) -> dict[Edge, LayerOutput]:
    """Return the outputs of calls, and what their first dimensions are."""
    return {
        (call.output.node, call.output.output_nr): LayerOutput(
            call.layer, _batching(call), len(call.y_shape) - call.is_unbatched
        )
        for call in calls
    }


def _batching(call: LayerCall) -> Batching:
    """Return what the first dimension of a call's output is."""
    if call.is_unbatched:
        return Batching.UNBATCHED
    return Batching.ONE_ROW if call.y_shape[:-1].numel() == 1 else Batching.BATCH


def may_be_unbatched(output: Tensor, calls: Iterable[LayerCall]) -> bool:
    """Return whether an output of a model may have no dimension of examples."""
    kinds = {_batching(call) for call in calls} - {Batching.BATCH}
    is_row = output.ndim == 1 and output.numel() > 1
    return Batching.UNBATCHED in kinds or (is_row and bool(kinds))


def shape_of(output: Tensor | GradientEdge) -> torch.Size:
    """Return the shape of a tensor that may be given as its gradient edge."""
    if isinstance(output, Tensor):
        return output.shape
    return torch.Size(metadata_of((output.node, output.output_nr)).shape)


def call_gradients(
    outputs: Sequence[Tensor | GradientEdge], roots: Sequence[Tensor], calls: Sequence[LayerCall]
) -> list[Tensor | None]:
    """Backpropagate root vectors to the outputs of the calls; the graph is kept.

    Args:
        outputs: Model outputs, or a loss, ``[*f]`` each.
        roots: A vector ``[*f]`` for each, or ``[1, *f]`` for an unbatched output.
        calls: Calls of layers.

    Returns:
        For each call, the gradient ``[*y]`` with respect to its output ``[*y]``, or ``None``
        if the outputs do not depend on it.
    """
    edges = [call.output for call in calls]
    if not (outputs and edges):
        return [None] * len(edges)
    sources: Any = outputs
    own = [r.reshape(shape_of(output)) for output, r in zip(outputs, roots)]
    found = torch.autograd.grad(sources, edges, own, retain_graph=True, allow_unused=True)
    return [None if g is None else g.reshape(call.y_shape) for g, call in zip(found, calls)]

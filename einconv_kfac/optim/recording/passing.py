"""Outputs of a model that a wrapper around it passes on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.module_hooks import is_compiling
from einconv_kfac.curvature.objective.graph import Edge, edge_of, passed_on_
from einconv_kfac.curvature.objective.outputs import tensors_of


class PassedOutputs:
    """Notes which tensor of a model each output of its `DistributedDataParallel` is.

    The wrapper copies outputs with ``find_unused_parameters`` or ``static_graph``. Copies of the
    wrapper, by ``deepcopy`` or ``pickle``, have hooks that do nothing.

    Args:
        wrapper: The wrapper; ``None`` for a copy.
    """

    def __init__(self, wrapper: nn.parallel.DistributedDataParallel | None = None) -> None:
        self._edges: list[Edge | None] | None = None  # of a call of the wrapper that has not ended
        self._is_active = wrapper is not None
        self._handles: Sequence[RemovableHandle] = ()
        if wrapper is None:
            return
        self._handles = (
            wrapper.register_forward_pre_hook(self._before_wrapper),
            wrapper.module.register_forward_hook(self._after_model),
            wrapper.register_forward_hook(self._after_wrapper, always_call=True),
        )

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _before_wrapper(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        """Begin to keep the outputs of the model."""
        if self._is_active and not is_compiling():
            self._edges = []

    def _after_model(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Keep the outputs of the model in a call of the wrapper; other calls pass nothing on."""
        if not is_compiling() and self._edges is not None:
            tensors = tensors_of(output)
            self._edges = [edge_of(t) if t.requires_grad else None for t in tensors]

    def _after_wrapper(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        """Note what the outputs of the wrapper are, and forget those of the model."""
        if is_compiling():
            return
        edges, self._edges = self._edges or [], None
        for tensor, edge in zip(tensors_of(output), edges):
            if edge is not None and tensor.requires_grad:
                passed_on_(tensor, edge)

    def __reduce__(self) -> tuple[Any, ...]:
        return PassedOutputs, ()

"""CUDA graphs of the simulated device: operators that are captured once and run again.

As on a GPU, a capture computes nothing: what it overwrites has its old values afterwards. A replay
runs the operators that were captured, in the order of the capture, on the memory of the capture;
numbers of the host are those of the capture. The host must not wait while it captures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from record import Record
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

UNDECLARED = {"running_mean", "running_var"}
"""Arguments that batch norm overwrites, though its schema does not say so."""


@dataclass(frozen=True)
class Node:
    """An operator that was captured.

    Args:
        run: Runs it.
        outputs: The tensors that it made.
    """

    run: Callable[[], Any]
    outputs: list[Any]


@dataclass
class Graph:
    """Operators that were captured."""

    nodes: list[Node] = field(default_factory=list)

    def replay(self) -> None:
        """Run the operators again."""
        with _disable_current_modes(), torch.no_grad():
            for node in self.nodes:
                for old, new in zip(node.outputs, tree_leaves(node.run()), strict=True):
                    if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                        old.copy_(new)


class Graphs:
    """Captures operators.

    Args:
        compute: Runs an operator on tensors of the host, given its short name.
        record: What notes waits.
    """

    def __init__(self, compute: Callable[..., Any], record: Record) -> None:
        self._compute = compute
        self._graph: Graph | None = None
        self._saved: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        record.on_wait = self.refuse
        self.new = Graph

    @property
    def is_capturing(self) -> bool:
        """Whether operators are being captured."""
        return self._graph is not None

    def refuse(self, what: str) -> None:
        """Raise an error if the host waits while it captures."""
        if self.is_capturing:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")

    @contextmanager
    def capturing(self, graph: Graph) -> Iterator[None]:
        """Capture what is inside of the block."""
        self._graph, self._saved = graph, {}
        try:
            yield
        finally:
            self._graph = None
            for storage, before in self._saved.values():
                storage.copy_(before)

    def save(self, func: Any, args: Any, kwargs: Any) -> None:
        """Save what an operator is going to overwrite."""
        if self._graph is None:
            return
        given = [*zip(func._schema.arguments, args)]
        given += [(own, kwargs[own.name]) for own in func._schema.arguments if own.name in kwargs]
        for own, value in given:
            is_written = own.alias_info is not None and own.alias_info.is_write
            if not (is_written or own.name in UNDECLARED):
                continue
            for tensor in tree_leaves(value):
                if isinstance(tensor, Tensor):
                    storage = tensor.untyped_storage()
                    self._saved.setdefault(storage.data_ptr(), (storage, storage.clone()))

    def note(self, func: Any, name: str, arguments: tuple[Any, Any], result: Any) -> None:
        """Note an operator, unless it makes another view of the same memory."""
        if self._graph is None or func.is_view:
            return
        args, kwargs = arguments

        def run() -> Any:
            return self._compute(func, name, args, kwargs)

        self._graph.nodes.append(Node(run, tree_leaves(result)))

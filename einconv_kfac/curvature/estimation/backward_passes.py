"""Backward passes of several vectors at the outputs of a model, as one pass where possible."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.estimation.capture import LayerCall, call_gradients, shape_of
from einconv_kfac.curvature.estimation.evaluation import Root
from einconv_kfac.curvature.objective.graph import reached_nodes

_ENTRIES = 1 << 20
"""Number of entries at outputs and calls that the vectors of one pass have together."""


class StackedRoots(NamedTuple):
    """Several root vectors.

    Args:
        vectors: The vectors ``[v, *f]`` for each output.
        are_alone: Whether each is alone, see `Root`.
    """

    vectors: list[Tensor]
    are_alone: list[bool]

    def single(self) -> list[Root]:
        """Return each of them."""
        return [Root(own, alone) for *own, alone in zip(*self.vectors, self.are_alone)]


class BackwardPasses:
    """Backward passes of one batch; the graph is kept.

    Several small vectors are backpropagated as one batch of vectors. Where the graph has functions
    written in Python, which may do anything, or an operation that takes no batch of vectors, they
    are backpropagated one after the other.

    Args:
        outputs: Outputs of the model, ``[*f]`` each, or a loss, or their gradient edges.
        calls: Calls of layers.
        may_batch: Whether several vectors may be one batch.
    """

    def __init__(
        self,
        outputs: Sequence[Tensor | GradientEdge],
        calls: Sequence[LayerCall],
        may_batch: bool,
    ) -> None:
        self._outputs = outputs
        self._entries = sum(prod(call.y_shape) for call in calls)
        self._is_batched = None if may_batch else False  # it is asked for when it matters

    def stacked(self, roots: Iterable[Root]) -> Iterator[StackedRoots]:
        """Yield root vectors, as many as one pass takes.

        The first one is alone, since it shows which calls the outputs depend on.
        """
        waiting, count = iter(roots), 1
        while chosen := list(islice(waiting, count)):
            vectors = [_stacked(own) for own in zip(*(root.vectors for root in chosen))]
            yield StackedRoots(vectors, [root.is_alone for root in chosen])
            count = self._count(chosen[0].vectors)

    def gradients(
        self, vectors: Sequence[Tensor], calls: Sequence[LayerCall]
    ) -> list[Tensor | None]:
        """Return the gradients ``[v, *y]`` at calls, ``None`` where there is none.

        Args:
            vectors: Vectors ``[v, *f]`` for each output.
            calls: The calls.
        """
        count = len(vectors[0]) if vectors else 0
        found = self._together(vectors, calls) if count > 1 else None
        if found is not None:
            return found
        passes = [call_gradients(self._outputs, own, calls) for own in zip(*vectors)]
        return [_known(own) for own in zip(*passes)]

    def by_example(self, root: Root, examples: int, calls: Sequence[LayerCall]) -> list[Tensor]:
        """Return the gradients ``[n, *y]`` at calls of each example's part of a root vector alone.

        That of one unit alone is not divided. It is the first, and the others are zero.

        Args:
            root: The root vector.
            examples: The number ``n`` of examples.
            calls: The calls.
        """
        found = [root.vectors[0].new_zeros(examples, *call.y_shape) for call in calls]
        if root.is_alone:
            whole = [vector.unsqueeze(0) for vector in root.vectors]
            _set_(found, slice(1), self.gradients(whole, calls))
            return found
        for start in range(0, examples, count := self._count(root.vectors)):
            chosen = torch.arange(start, min(start + count, examples))
            own = self.gradients([_only(v, chosen) for v in root.vectors], calls)
            _set_(found, slice(start, start + count), own)
        return found

    def _count(self, vectors: Sequence[Tensor]) -> int:
        """Return how many vectors one pass takes."""
        if self._is_batched is None:
            nodes = reached_nodes(self._outputs)
            self._is_batched = not any(isinstance(node, BackwardCFunction) for node in nodes)
        entries = self._entries + sum(vector.numel() for vector in vectors)
        return max(1, _ENTRIES // max(1, entries)) if self._is_batched else 1

    def _together(
        self, vectors: Sequence[Tensor], calls: Sequence[LayerCall]
    ) -> list[Tensor | None] | None:
        """Return the gradients by one pass, ``None`` where an operation takes no batches."""
        sources: Any = self._outputs
        edges = [call.output for call in calls]
        if not (self._is_batched and edges):
            return None
        own = [v.reshape(len(v), *shape_of(o)) for o, v in zip(self._outputs, vectors)]
        with warnings.catch_warnings():  # of operations that repeat themselves for each vector
            warnings.filterwarnings("ignore", "There is a performance drop")
            try:
                found = torch.autograd.grad(
                    sources,
                    edges,
                    own,
                    retain_graph=True,
                    allow_unused=True,
                    is_grads_batched=True,
                )
            except RuntimeError:
                self._is_batched = False
                return None
        count = len(vectors[0])
        return [
            None if g is None else g.reshape(count, *call.y_shape) for g, call in zip(found, calls)
        ]


def _set_(found: Sequence[Tensor], examples: slice, gradients: Sequence[Tensor | None]) -> None:
    """Set the gradients of some examples by call, where there are any."""
    for own, gradient in zip(found, gradients):
        if gradient is not None:
            own[examples] = gradient


def _known(gradients: Sequence[Tensor | None]) -> Tensor | None:
    """Return gradients of several passes as one tensor, ``None`` where there is none."""
    known = [gradient for gradient in gradients if gradient is not None]
    return _stacked(known) if known else None


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors as one, a view of a single one."""
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack([*tensors])


def _only(vector: Tensor, examples: Tensor) -> Tensor:
    """Return vectors ``[v, n, ...]``, each of which is zero for all examples but one, ``[v]``."""
    result = vector.new_zeros(len(examples), *vector.shape)
    if vector.ndim:
        own = examples[examples < len(vector)].to(vector.device)
        result[torch.arange(len(own), device=own.device), own] = vector[own]
    return result

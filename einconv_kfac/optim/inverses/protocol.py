"""The protocol of a layer's damped inverse, and what a kind of inverse consists of."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import UNKNOWN_RANKS, Bounds, Pair
from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.optim.state_schema import Schema

Inverse: TypeAlias = str
"""Name of a kind of inverse; `registry.kind_of` checks it."""


class LayerInverse(Protocol):
    """The damped inverse of one layer's curvature, an immutable dataclass.

    The methods that return the inverse itself are for kinds with nothing to change.

    Attributes:
        kind: Name of its kind.
        damping: Its damping.
    """

    kind: ClassVar[str]
    damping: float

    @property
    def eigenbasis(self) -> EigenBlock | None:
        """The basis in which the inverse takes squared gradients; ``None`` if it takes none."""
        return None

    @abstractmethod
    def apply(self, rows: Tensor) -> Tensor:
        """Return the inverse times matrices ``[g, co, d]``."""

    @abstractmethod
    def to(self, device: torch.device) -> LayerInverse:
        """Return the inverse on a device."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return ``"kind"``, and tensors and numbers from which `inverse_of` makes a copy."""

    @property
    def form(self) -> Hashable | None:
        """What inverses share that `joined` makes one of; ``None`` if there is no such method."""
        return None

    def joined(self, others: Sequence[LayerInverse]) -> LayerInverse:
        """Return the inverse with the channel groups of others of the same form after its own."""
        raise NotImplementedError

    def with_damping(self, damping: float) -> LayerInverse:
        """Return the inverse with another damping; itself if that needs a decomposition."""
        return self

    def with_statistics_of(self, previous: LayerInverse | None) -> LayerInverse:
        """Return the inverse with the averages of squared gradients of the layer's last one."""
        return self

    def with_squared_gradients(self, squares: Tensor, decay: float) -> LayerInverse:
        """Return the inverse after an update of its averages of squared gradients.

        Args:
            squares: Means over examples of squared per-example gradients in the `eigenbasis`,
                ``[g, co, d]``.
            decay: Decay of the exponential moving average.
        """
        return self


@dataclass(frozen=True)
class Task:
    """One layer's factors to invert.

    Args:
        name: The layer.
        factors: ``A [g, d, d]`` and ``B [g, co, co]``; those that are diagonal as ``[g, d]``.
        damping: The damping.
        layout: The layer's parameters.
        bounds: Bounds on the ranks of the factors.
    """

    name: str
    factors: Pair
    damping: float
    layout: Layout
    bounds: Bounds = UNKNOWN_RANKS

    def copied(self) -> Task:
        """Return the task with copies of its factors, for another thread."""
        (a, b), (of_a, of_b) = self.factors, self.bounds
        return replace(self, factors=(a.clone(), b.clone()), bounds=(of_a.anew(), of_b.anew()))

    @property
    def work(self) -> int:
        """The multiplications of its decompositions, up to a factor."""
        sizes = [(own.numel(), own.shape[-1], is_diagonal(own)) for own in self.factors]
        return sum(entries * (1 if diagonal else size) for entries, size, diagonal in sizes)


@dataclass(frozen=True)
class Inverted:
    """One layer's inverse, and how it was computed.

    Args:
        inverse: The inverse.
        conditions: The condition numbers of ``A`` and ``B``, ``[2]``, the largest of the groups:
            with ``"factored"`` those of the damped factors, in the 1-norm; otherwise those of
            the factors without damping, in the 2-norm.
        retries: Number of repeated decompositions.
        seconds: The layer's share of the time, by the size of its factors.
    """

    inverse: LayerInverse
    conditions: Tensor
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A kind of inverse.

    Args:
        name: The value of ``inverse=`` that selects it, and `LayerInverse.kind` of its inverses.
        invert: Inverts the factors of layers. Raises a ``RuntimeError`` if a damped factor is
            not positive definite.
        load: Makes an inverse of its `LayerInverse.state_dict` without ``"kind"``, whose tensors
            it may keep, and the layer's layout.
        damping_needs_decomposition: Whether another damping takes a new decomposition; if not,
            `LayerInverse.with_damping` sets it.
        needs_per_example_gradients: Whether its inverses take squared per-example gradients.
        schema: Returns what `LayerInverse.state_dict` must be, for the layer's layout and the
            shapes of its factors; without it, a state is checked by making an inverse of it.
    """

    name: str
    invert: Callable[[Sequence[Task]], list[Inverted]]
    load: Callable[[dict[str, Any], Layout], LayerInverse]
    damping_needs_decomposition: bool
    needs_per_example_gradients: bool = False
    schema: Callable[[Layout, Sequence[Sequence[int]]], Schema] | None = None

    def timed(self, tasks: Sequence[Task]) -> list[Inverted]:
        """Invert the factors of layers, and divide the time among them by their sizes.

        Raises:
            RuntimeError: If a damped factor is not positive definite.
        """
        start = perf_counter()
        results = self.invert(tasks)
        seconds = perf_counter() - start
        total = sum(task.work for task in tasks)
        return [
            replace(found, seconds=seconds * task.work / total)
            for task, found in zip(tasks, results)
        ]

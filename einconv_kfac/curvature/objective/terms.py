"""Terms of a loss: where its curvature comes from, seen from the model's outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature


@dataclass(frozen=True)
class Term:
    """A part of the loss with curvature ``J^T H J`` at the model's outputs.

    Args:
        argument: Edges whose differences are the argument of the term: the first minus the second,
            if there are two.
        maps: The derivative ``J`` of each of them by the outputs.
        curvature: The curvature ``H`` at the argument.
        name: The operation that it comes from.
    """

    argument: tuple[Edge, ...]
    maps: tuple[LinearMap, ...]
    curvature: LocalCurvature
    name: str

    @property
    def sources(self) -> set[Edge]:
        """The outputs that the term depends on."""
        return {edge for each in self.maps for edge in each.sources}

    def tangent(self, vectors: Mapping[Edge, Tensor]) -> Tensor | None:
        """Return ``J v``, or ``None`` if it is zero."""
        parts = [each(vectors) for each in self.maps]
        signed = [-p if index else p for index, p in enumerate(parts) if p is not None]
        return sum(signed[1:], signed[0]) if signed else None

    def gradients(self, root: Tensor) -> dict[Edge, Tensor]:
        """Return a vector at the argument as gradients at its edges."""
        return {edge: -root if index else root for index, edge in enumerate(self.argument)}

    def products(self, several: Sequence[Mapping[Edge, Tensor]]) -> Tensor | None:
        """Return ``v_i.J^T H J.v_j``, ``[m, m]`` in float64, or ``None`` if it is zero."""
        tangents = [self.tangent(vectors) for vectors in several]
        known = next((tangent for tangent in tangents if tangent is not None), None)
        if known is None:
            return None
        zero = torch.zeros_like(known)
        return self.curvature.products([zero if t is None else t for t in tangents])

    def roots(self, example_of: Tensor) -> Iterator[tuple[Tensor, bool]]:
        """Yield vectors at the argument, and whether each has one unit alone.

        The others have one unit of every example.

        Args:
            example_of: The example that each unit belongs to, or -1 if to several; flat.
        """
        ranks = _ranks(example_of)
        alone = set(ranks[example_of == -1].tolist())
        for root in self.curvature.roots():
            for rank in range(int(ranks.max()) + 1 if ranks.numel() else 0):
                kept = (ranks == rank).reshape(self.curvature.rows)
                yield self.curvature.masked(root, kept), rank in alone

    def sample(self, generator: Generator) -> Tensor:
        """Draw a vector at the argument with second moment ``H``."""
        return self.curvature.sample(generator)


@dataclass(frozen=True)
class JointTerm(Term):
    """A term of several tensors of one shape ``[*a]``, side by side as ``[*a, K]``."""

    def tangent(self, vectors: Mapping[Edge, Tensor]) -> Tensor | None:
        """See `Term`."""
        parts = [each(vectors) for each in self.maps]
        known = next((part for part in parts if part is not None), None)
        if known is None:
            return None
        return torch.stack([torch.zeros_like(known) if p is None else p for p in parts], -1)

    def gradients(self, root: Tensor) -> dict[Edge, Tensor]:
        """See `Term`."""
        return dict(zip(self.argument, root.unbind(-1)))


def _ranks(example_of: Tensor) -> Tensor:
    """Return the number of earlier units of the same example; units of several come alone."""
    ranks = torch.zeros_like(example_of)
    for example in set(example_of.tolist()):
        own = example_of == example
        ranks[own] = torch.arange(int(own.sum()), device=ranks.device)
    mixed = example_of == -1
    ranks[mixed] += int(ranks[~mixed].max()) + 1 if bool((~mixed).any()) else 0
    return ranks

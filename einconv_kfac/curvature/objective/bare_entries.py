"""Parts of an output of a model in which a loss has slope and no curvature, as in a column."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.local_curvature import Diagonal
from einconv_kfac.curvature.objective.terms import Term
from einconv_kfac.curvature.objective.units import drawn


def places_without_curvature(
    terms: Iterable[Term], gradients: Mapping[Edge, Tensor], unbatched: Collection[Edge]
) -> dict[Edge, Tensor]:
    """Return where outputs that a loss has slope at lack curvature, in whole or in slices.

    A slice has one index in one of the dimensions after the first, over all examples. Outputs
    without such slices are left out.

    Args:
        terms: The terms of the loss.
        gradients: The gradients of the loss at outputs ``[n, *f]``.
        unbatched: Outputs ``[*f]``, of one example.
    """
    curved: dict[Edge, Tensor] = {}
    for term in terms:
        for edge, own in _support(term).items():
            known = curved.get(edge)
            curved[edge] = own if known is None else known | own
    found = {}
    for edge, gradient in gradients.items():
        places = curved.get(edge)
        if places is None:
            found[edge] = torch.ones_like(gradient, dtype=torch.bool)
        elif places.ndim > (edge not in unbatched):  # not of a curvature of the whole
            bare = _bare(places.unsqueeze(0)).squeeze(0) if edge in unbatched else _bare(places)
            if bool(gradient.where(bare, 0).any()):
                found[edge] = bare
    return found


def _support(term: Term) -> dict[Edge, Tensor]:
    """Return where each output has curvature by a term."""
    if not isinstance(term.curvature, Diagonal) and all(map_.is_identity for map_ in term.maps):
        return {edge: torch.ones((), dtype=torch.bool) for edge in term.sources}
    shares = term.curvature.support()
    random = _positive_like(shares) * (shares > 0)
    found: dict[Edge, Tensor] = {}
    for map_, own in zip(term.maps, term.gradients(random).values()):
        for edge, part in map_.transposed(own).items():
            found[edge] = found[edge] | (part != 0) if edge in found else part != 0
    return found


def _positive_like(shares: Tensor) -> Tensor:
    """Return positive numbers, which no linear map is likely to cancel, that broadcast to a shape.

    They are products of random numbers for each dimension, of which few are drawn.
    """
    result = shares.new_ones(())
    for dim, size in enumerate(shares.shape):
        own = 0.5 + drawn(shares.new_empty(size), dim).abs()
        result = result.unsqueeze(-1) * own
    return result


def _bare(curved: Tensor) -> Tensor:
    """Return the entries of slices without curvature."""
    bare = torch.zeros_like(curved)
    for dim in range(1, curved.ndim):
        others = [each for each in range(curved.ndim) if each != dim]
        bare |= ~curved.any(others, keepdim=True)
    return bare

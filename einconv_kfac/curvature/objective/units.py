"""Which example each unit of a term belongs to."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.local_curvature import LocalCurvature
from einconv_kfac.curvature.objective.terms import Term


def example_of_units(
    term: Term,
    outputs: Mapping[Edge, Tensor],
    unbatched: Collection[Edge],
    device: torch.device,
) -> Tensor:
    """Return the example of each unit of a term, or -1 for several; flat.

    Args:
        term: The term.
        outputs: The values of the model's outputs.
        unbatched: Those that are one example, without a dimension of examples.
        device: The device of the result.
    """
    outputs = {e: v.unsqueeze(0) if e in unbatched else v for e, v in outputs.items()}
    sizes = {len(value) for edge, value in outputs.items() if edge in term.sources and value.ndim}
    found = torch.full((term.curvature.rows.numel(),), -2, dtype=torch.long)
    for example in range(max(sizes, default=0)):
        vectors = {edge: _only(value, example) for edge, value in outputs.items()}
        vectors = {e: v.squeeze(0) if e in unbatched else v for e, v in vectors.items()}
        tangent = term.tangent(vectors)
        if tangent is None:
            continue
        touched = _by_unit(tangent != 0, term.curvature).cpu()
        found[touched] = torch.where(found[touched] == -2, example, -1)
    return found.where(found != -2, -1).to(device)


def _only(value: Tensor, example: int) -> Tensor:
    """Return random numbers for one example and zeros for the others, ``[n, ...]``."""
    result = torch.zeros_like(value)
    if value.ndim and example < len(value):
        result[example] = drawn(value[example])
    return result


def drawn(like: Tensor, seed: int = 0) -> Tensor:
    """Return random numbers in the shape of a tensor, the same for the same seed."""
    generator = Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _by_unit(touched: Tensor, curvature: LocalCurvature) -> Tensor:
    """Return whether each unit has an entry that is touched; flat."""
    dim: Any = getattr(curvature, "dim", None)
    if dim is not None:
        touched = touched.any(dim)
    if touched.ndim > len(curvature.rows):
        touched = touched.flatten(len(curvature.rows)).any(-1)
    return touched.flatten()

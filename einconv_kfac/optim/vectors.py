"""Directions in parameter space: tensors by parameter name, and their algebra."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Direction: TypeAlias = dict[str, Tensor]
"""A tensor per parameter name."""


def inner(a: Direction, b: Direction, weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the (weighted) inner product over the parameters that both have, in float64."""
    names = [name for name in a if name in b]
    parts = [torch.dot(a[name].flatten(), b[name].flatten()).double() for name in names]
    if weights:
        parts = [part * weights[name] for part, name in zip(parts, names)]
    device = next(iter(a.values())).device
    return sum_of(parts) if parts else torch.zeros((), dtype=torch.float64, device=device)


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(dim=0)


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each of many tensors."""
    tensors = list(tensors)
    return list(torch._foreach_norm(tensors)) if tensors else []


def combined(name: str, coefficients: Sequence[float], directions: Sequence[Direction]) -> Tensor:
    """Return a linear combination of directions for one parameter."""
    (factor, first), *others = [(c, d[name]) for c, d in zip(coefficients, directions) if name in d]
    total = first * factor
    for factor, tensor in others:
        total.add_(tensor, alpha=factor)
    return total


def layer_of(name: str) -> str:
    """Return the name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]

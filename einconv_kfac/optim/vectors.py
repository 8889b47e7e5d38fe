"""Directions in parameter space: tensors by parameter name, and their algebra.

Inner products are taken tensor by tensor in the tensors' dtype, at least float32, and added in
float64. A complex tensor counts as its real and its imaginary part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Direction: TypeAlias = dict[str, Tensor]
"""A tensor per parameter name."""


def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the data type of sums, averages and steps: at least float32.

    Squares of small gradients underflow in float16, and small steps are lost in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def entries(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor as a vector of real numbers, at least in float32."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.flatten().to(precise(tensor.dtype))


def inner(a: Direction, b: Direction, weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the (weighted) inner product over the parameters that both have, in float64."""
    names = [name for name in a if name in b]
    parts = [torch.dot(entries(a[name]), entries(b[name])).double() for name in names]
    if weights:
        parts = [part * weights[name] for part, name in zip(parts, names)]
    device = next(iter(a.values())).device
    return sum_of(parts) if parts else torch.zeros((), dtype=torch.float64, device=device)


def inner_products(a: Direction, several: Sequence[Direction]) -> Tensor:
    """Return the inner products of one direction with several, ``[m]``."""
    return torch.stack([inner(a, b) for b in several])


def gram_matrix(
    directions: Sequence[Direction], weights: Mapping[str, float] | None = None
) -> Tensor:
    """Return the (weighted) inner products of all pairs of directions, ``[m, m]``."""
    rows = [torch.stack([inner(a, b, weights) for b in directions]) for a in directions]
    return torch.stack(rows)


def products_by_layer(
    layers: Iterable[Sequence[str]], pairs: Sequence[tuple[Direction, Direction]]
) -> list[list[float]]:
    """Return the inner product of each pair over each layer's parameters, ``[layers][pairs]``.

    The host waits for the device once.

    Args:
        layers: Names of the parameters of each layer.
        pairs: The pairs of directions.
    """
    rows = [
        torch.stack([inner({n: a[n] for n in names if n in a}, b) for a, b in pairs])
        for names in layers
    ]
    found: list[list[float]] = torch.stack(rows).tolist() if rows else []
    return found


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(dim=0)


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each of many tensors."""
    tensors = list(tensors)
    return list(torch._foreach_norm(tensors)) if tensors else []


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all entries are finite; the host waits for the device.

    A tensor is finite where its norm is. Entries are looked at one by one only if a norm is not,
    since it may overflow.
    """
    if not tensors or bool(torch.stack(norms(tensors)).isfinite().all()):
        return True
    return bool(torch.stack([tensor.isfinite().all() for tensor in tensors]).all())


def combination(
    names: Iterable[str], coefficients: Sequence[float], directions: Sequence[Direction]
) -> Direction:
    """Return a linear combination of directions, over the named parameters, at least in float32.

    Args:
        names: The parameters; each is part of at least one direction.
        coefficients: A coefficient for each direction.
        directions: The directions.
    """
    return {name: _combined(name, coefficients, directions) for name in names}


def _combined(name: str, coefficients: Sequence[float], directions: Sequence[Direction]) -> Tensor:
    """Return a linear combination of directions for one parameter."""
    (factor, first), *others = [(c, d[name]) for c, d in zip(coefficients, directions) if name in d]
    total = first.to(precise(first.dtype)) * factor
    for factor, tensor in others:
        total.add_(tensor, alpha=factor)
    return total


def scaled(direction: Direction, factors: Mapping[str, float]) -> Direction:
    """Return a direction times a factor per parameter."""
    return {name: tensor * factors[name] for name, tensor in direction.items()}


def layer_of(name: str) -> str:
    """Return the name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return parameter names by the name of their module."""
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    return layers

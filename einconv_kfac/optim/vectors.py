"""Directions in parameter space: tensors by parameter name, and their algebra.

Inner products are taken in the tensors' dtype, at least float32, of large tensors one by one and of
small ones joined to vectors, and added in float64. A complex tensor counts as its real and its
imaginary part.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import combinations_with_replacement
from typing import TypeAlias, TypeVar

import torch
from torch import Tensor

Key = TypeVar("Key", bound=Hashable)
Direction: TypeAlias = dict[str, Tensor]
"""A tensor per parameter name."""

LARGEST_JOINED_ENTRIES = 1 << 14
"""Entries of a tensor up to which copying it costs less than starting an operation for it."""
IN_FULL = frozenset({torch.float32, torch.float64})
"""Real data types that are precise, see `precise`."""
JOINED_ENTRIES = 1 << 20
"""Entries of a vector of several tensors: what is copied at a time."""


@cache
def precise(dtype: torch.dtype) -> torch.dtype:
    """Return the data type of sums, averages and steps: at least float32.

    Squares of small gradients underflow in float16, and small steps are lost in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32)


def entries(tensor: Tensor) -> Tensor:
    """Return the entries of a tensor as a vector of real numbers, at least in float32."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    flat, dtype = tensor.flatten(), precise(tensor.dtype)
    return flat if flat.dtype == dtype else flat.to(dtype)


def real_vectors(names: Iterable[str], *directions: Direction) -> list[dict[str, Tensor]]:
    """Return the `entries` of some tensors of each direction that has them."""
    found: list[dict[str, Tensor]] = []
    for direction in directions:
        own = [(name, direction[name]) for name in names if name in direction]
        found.append({n: t.flatten() if t.dtype in IN_FULL else entries(t) for n, t in own})
    return found


def inner(a: Direction, b: Direction, weights: Mapping[str, float] | None = None) -> Tensor:
    """Return the (weighted) inner product over the parameters that both have, in float64."""
    sums = []
    for weight, names in _by_weight([name for name in a if name in b], weights).items():
        parts = [torch.dot(_joined(a, own), _joined(b, own)) for own in _chunks(names, a)]
        total = _sum_in_float64(parts)
        sums.append(total if weight is None else total * weight)
    device = next(iter(a.values())).device
    return sum_of(sums) if sums else torch.zeros((), dtype=torch.float64, device=device)


def squared_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of the squared entries of tensors, in float64 from the squares on."""
    direction = {str(index): tensor for index, tensor in enumerate(tensors)}
    vectors = [_joined(direction, chunk).double() for chunk in _chunks(direction, direction)]
    return sum_of([torch.dot(vector, vector) for vector in vectors])


def inner_products(a: Direction, several: Sequence[Direction]) -> Tensor:
    """Return the inner products of one direction with several, ``[m]``."""
    return torch.stack([inner(a, b) for b in several])


def gram_matrix(
    directions: Sequence[Direction], weights: Mapping[str, float] | None = None
) -> Tensor:
    """Return the (weighted) inner products of all pairs of directions, ``[m, m]``, in float64."""
    count = len(directions)
    sums: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
    names = dict.fromkeys(name for direction in directions for name in direction)
    holders = {n: tuple(i for i in range(count) if n in directions[i]) for n in names}
    for own, alike in _grouped(holders).items():
        for weight, weighted in _by_weight(alike, weights).items():
            products: dict[tuple[int, int], list[Tensor]] = defaultdict(list)
            for chunk in _chunks(weighted, directions[own[0]]):
                vectors = {i: _joined(directions[i], chunk) for i in own}
                for i, j in combinations_with_replacement(own, 2):
                    products[i, j].append(torch.dot(vectors[i], vectors[j]))
            for pair, parts in products.items():
                total = _sum_in_float64(parts)
                sums[pair].append(total if weight is None else total * weight)
    device = next(tensor.device for direction in directions for tensor in direction.values())
    zero = torch.zeros((), dtype=torch.float64, device=device)
    totals = {pair: sum_of(found) for pair, found in sums.items()}
    pairs = [(min(i, j), max(i, j)) for i in range(count) for j in range(count)]
    return torch.stack([totals.get(pair, zero) for pair in pairs]).reshape(count, count)


def _by_weight(
    names: Iterable[str], weights: Mapping[str, float] | None
) -> dict[float | None, list[str]]:
    """Return names by their weight, all by ``None`` without weights."""
    names = list(names)
    own = {weights[name] for name in names} if weights else {None}
    if len(own) <= 1:
        return dict.fromkeys(own, names)
    assert weights
    return _grouped({name: weights[name] for name in names})


def _chunks(names: Iterable[str], direction: Direction) -> Iterator[list[str]]:
    """Yield names of tensors that are joined: a large one, or small ones of one type."""
    small: dict[str, tuple[torch.dtype, torch.device]] = {}
    for name in names:
        tensor = direction[name]
        if tensor.numel() > LARGEST_JOINED_ENTRIES:
            yield [name]
        else:
            small[name] = tensor.dtype, tensor.device
    for alike in _grouped(small).values():
        chunk: list[str] = []
        size = 0
        for name in alike:
            if size >= JOINED_ENTRIES:
                yield chunk
                chunk, size = [], 0
            chunk.append(name)
            size += direction[name].numel()
        yield chunk


def _joined(direction: Direction, names: Sequence[str]) -> Tensor:
    """Return the entries of tensors as one vector."""
    vectors = [entries(direction[name]) for name in names]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _grouped(keys: Mapping[str, Key]) -> dict[Key, list[str]]:
    """Return names by their keys."""
    groups: dict[Key, list[str]] = defaultdict(list)
    for name, key in keys.items():
        groups[key].append(name)
    return groups


def sum_of(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return tensors[0] if len(tensors) == 1 else torch.stack(list(tensors)).sum(dim=0)


def _sum_in_float64(numbers: Sequence[Tensor]) -> Tensor:
    """Return the sum of numbers, of each data type at once."""
    if len(numbers) == 1:
        return numbers[0].double()
    alike: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for number in numbers:
        alike[number.dtype].append(number)
    return sum_of([torch.stack(own).sum(dtype=torch.float64) for own in alike.values()])


def norms(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return the Euclidean norm of each of many tensors."""
    tensors = list(tensors)
    return list(torch._foreach_norm(tensors)) if tensors else []


def totals(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return sums of entries, together of all of them: one number for each data type."""
    if len(tensors) == 1:
        return [entries(tensors[0]).sum()]
    direction = {str(index): tensor for index, tensor in enumerate(tensors)}
    sums: dict[torch.dtype, list[Tensor]] = defaultdict(list)
    for chunk in _chunks(direction, direction):
        vector = _joined(direction, chunk)
        sums[vector.dtype].append(vector.sum())
    return [torch.stack(own).sum() for own in sums.values()]


def first_not_finite(direction: Direction) -> str | None:
    """Return the first name whose entries are not all finite; the host waits for the device.

    A tensor is finite where its norm is. Entries are looked at one by one only if a norm is not,
    since it may overflow.
    """
    tensors = [*direction.values()]
    if not tensors or bool(torch.stack(norms(tensors)).isfinite().all()):
        return None
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors]).tolist()
    return next((name for name, is_finite in zip(direction, flags) if not is_finite), None)


def combination(
    names: Iterable[str], coefficients: Sequence[float], directions: Sequence[Direction]
) -> Direction:
    """Return a linear combination of directions, over the named parameters, at least in float32.

    Args:
        names: The parameters; each is part of at least one direction.
        coefficients: A coefficient for each direction.
        directions: The directions.
    """
    names, count = list(names), len(directions)
    result: Direction = {}
    groups: dict[tuple[int, ...], list[str]] = {(0,): names} if names else {}
    if count > 1:
        holders = {n: tuple(i for i in range(count) if n in directions[i]) for n in names}
        groups = _grouped(holders)
    for (first, *others), own in groups.items():
        terms = [directions[first][name] for name in own]
        terms = [t if t.dtype in IN_FULL else t.to(precise(t.dtype)) for t in terms]
        totals = list(torch._foreach_mul(terms, coefficients[first]))
        for i in others:
            torch._foreach_add_(totals, [directions[i][n] for n in own], alpha=coefficients[i])
        result.update(zip(own, totals))
    return result if len(groups) == 1 else {name: result[name] for name in names}


def scaled(direction: Direction, factors: Mapping[str, float]) -> Direction:
    """Return a direction times a factor per parameter."""
    if not direction:
        return {}
    numbers = [factors[name] for name in direction]
    return dict(zip(direction, torch._foreach_mul(list(direction.values()), numbers)))


def multiplied(tensors: Sequence[Tensor], factor: float | Tensor) -> list[Tensor]:
    """Return tensors times a number, which may be on the device."""
    if not isinstance(factor, Tensor):
        return list(torch._foreach_mul(list(tensors), factor))
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        alike[tensor.dtype].append(index)
    found: dict[int, Tensor] = {}
    for dtype, own in alike.items():
        each = torch._foreach_mul([tensors[index] for index in own], factor.to(dtype))
        found.update(zip(own, each))
    return [found[index] for index in range(len(tensors))]


@cache
def layer_of(name: str) -> str:
    """Return the name of the module that a parameter belongs to."""
    return name.rpartition(".")[0]


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """Return parameter names by the name of their module."""
    return _grouped({name: layer_of(name) for name in names})

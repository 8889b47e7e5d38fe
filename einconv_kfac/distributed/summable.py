"""Sums over examples, which workers add up layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from einconv_kfac.distributed.triangles import Symmetric

_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True)
class SumPart:
    """A sum over examples.

    Args:
        value: The sum, or ``None`` before the first example.
        shape: Its shape.
        device: Its device.
        assign: Replaces it.
        symmetric: Whether it consists of symmetric matrices ``[g, d, d]``.
        for_all: Whether all workers need it, also of a layer that one of them owns.
    """

    value: Tensor | None
    shape: tuple[int, ...]
    device: torch.device
    assign: Callable[[Tensor | None], None]
    symmetric: bool = False
    for_all: bool = False

    @staticmethod
    def of(
        owner: object,
        name: str,
        shape: Sequence[int],
        device: torch.device,
        *,
        symmetric: bool = False,
        for_all: bool = False,
    ) -> SumPart:
        """Return the sum that an object has as an attribute of a name."""
        assign = partial(setattr, owner, name)
        return SumPart(getattr(owner, name), tuple(shape), device, assign, symmetric, for_all)


class Summable(Protocol):
    """Sums over the examples that one worker has seen, for one layer."""

    def counts(self) -> list[int]:
        """Return the numbers of examples and terms; there are always as many."""

    def set_counts_(self, counts: Sequence[int]) -> None:
        """Replace the numbers of examples and terms."""

    def parts(self) -> list[SumPart]:
        """Return the sums; there are always as many."""


@dataclass(frozen=True)
class Wanted:
    """A sum that some worker has.

    Args:
        layer: The layer's name.
        index: The index of the sum among those of the layer.
        dtype: The widest of the data types that workers have it in.
    """

    layer: str
    index: int
    dtype: torch.dtype


def counts_of(layers: Mapping[str, Summable], device: torch.device) -> Tensor:
    """Return numbers of examples and terms, and which sums are there, as one vector."""
    rows = (row for name in sorted(layers) for row in _row(layers[name]))
    return torch.tensor([float(number) for number in rows], dtype=torch.float64, device=device)


def wanted_of(layers: Mapping[str, Summable], total: Tensor) -> list[Wanted]:
    """Return the sums that some worker has, from the sum of `counts_of` over workers."""
    found = []
    for name, (_, presence) in _rows(layers, total).items():
        for index in range(len(layers[name].parts())):
            own = presence[index * len(_DTYPES) : (index + 1) * len(_DTYPES)]
            dtypes = [dtype for dtype, count in zip(_DTYPES, own) if count]
            if dtypes:
                found.append(Wanted(name, index, dtypes[-1]))
    return found


def tensors_of(
    layers: Mapping[str, Summable], wanted: Sequence[Wanted]
) -> list[Tensor | Symmetric]:
    """Return sums in their data types, zero where there are none."""
    return [_filled(layers[own.layer].parts()[own.index], own.dtype) for own in wanted]


def receivers_of(
    layers: Mapping[str, Summable], wanted: Sequence[Wanted], owners: Mapping[str, int]
) -> list[int | None]:
    """Return the worker that needs each sum; all of a layer without owner, ``None``."""
    parts = [layers[own.layer].parts()[own.index] for own in wanted]
    return [None if p.for_all else owners.get(own.layer) for p, own in zip(parts, wanted)]


def replace_(
    layers: Mapping[str, Summable],
    total: Tensor,
    wanted: Sequence[Wanted],
    results: Sequence[Tensor | None],
) -> None:
    """Replace the sums of layers by those over all workers.

    Where no worker has a sum, there is none afterwards, nor is there on workers that do not own
    the layer. Numbers of examples and terms are on all.

    Args:
        layers: The layers, the same on all workers.
        total: The sum of `counts_of` over workers.
        wanted: The sums that some worker has.
        results: Their totals, where this worker needs them.
    """
    for name, (counts, _) in _rows(layers, total).items():
        layers[name].set_counts_(counts)
    for own, result in zip(wanted, results):
        layers[own.layer].parts()[own.index].assign(result)


def _row(layer: Summable) -> list[int]:
    """Return the numbers of one layer, and whether each sum is there in each of the data types."""
    values = [part.value for part in layer.parts()]
    presence = [int(v is not None and v.dtype == dtype) for v in values for dtype in _DTYPES]
    return [*layer.counts(), *presence]


def _rows(layers: Mapping[str, Summable], total: Tensor) -> dict[str, tuple[list[int], list[int]]]:
    """Return numbers of examples and terms, and of workers that have sums, by layer."""
    names = sorted(layers)
    sizes = [len(_row(layers[name])) for name in names]
    numbers = [[round(own) for own in row.tolist()] for row in torch.split(total, sizes)]
    counts = [len(layers[name].counts()) for name in names]
    return {name: (row[:own], row[own:]) for name, row, own in zip(names, numbers, counts)}


def _filled(part: SumPart, dtype: torch.dtype) -> Tensor | Symmetric:
    """Return a sum in a data type, zero where there is none."""
    value = part.value
    if value is None:
        value = torch.zeros(part.shape, dtype=dtype, device=part.device)
    value = value.to(dtype)
    return Symmetric(value) if part.symmetric else value

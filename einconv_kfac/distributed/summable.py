"""Sums over examples, which workers add up layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


Sums = Callable[[Sequence[Tensor | Symmetric], Sequence["int | None"]], Sequence["Tensor | None"]]
"""Returns the sums of tensors over workers, each on one of them or, for ``None``, on all; ``None``
elsewhere."""


def add_up_(
    layers: Mapping[str, Summable], device: torch.device, sums: Sums, owners: Mapping[str, int]
) -> None:
    """Replace the sums of layers by those over all workers.

    Where no worker has a sum, there is none afterwards, nor is there on workers that do not own
    the layer. Numbers of examples and terms are on all.

    Args:
        layers: The layers, the same on all workers.
        device: The device of counts.
        sums: Adds tensors up.
        owners: The workers that own layers; all have the sums of a layer without one.
    """
    names = sorted(layers)
    own = [layers[name] for name in names]
    rows = [[*layer.counts(), *_presence(layer.parts())] for layer in own]
    flat = [float(number) for row in rows for number in row]
    (total,) = sums([torch.tensor(flat, dtype=torch.float64, device=device)], [None])
    assert total is not None
    found = iter(torch.split(total, [len(row) for row in rows]))
    wanted: list[tuple[SumPart, torch.dtype]] = []
    receivers: list[int | None] = []
    for name, layer in zip(names, own):
        numbers = [round(number) for number in next(found).tolist()]
        counts = len(layer.counts())
        layer.set_counts_(numbers[:counts])
        parts = [*_wanted(layer.parts(), numbers[counts:])]
        receivers += [None if part.for_all else owners.get(name) for part, _ in parts]
        wanted += parts
    results = sums([_filled(p, dtype) for p, dtype in wanted], receivers) if wanted else []
    for (part, _), result in zip(wanted, results):
        part.assign(result)


def _presence(parts: Sequence[SumPart]) -> Iterator[int]:
    """Yield whether each sum is there, in each of the data types."""
    for part in parts:
        yield from (int(part.value is not None and part.value.dtype == d) for d in _DTYPES)


def _wanted(
    parts: Sequence[SumPart], presence: Sequence[int]
) -> Iterator[tuple[SumPart, torch.dtype]]:
    """Yield the sums that some worker has, with the widest of their data types."""
    width = len(_DTYPES)
    for index, part in enumerate(parts):
        own = presence[index * width : (index + 1) * width]
        dtypes = [dtype for dtype, count in zip(_DTYPES, own) if count]
        if dtypes:
            yield part, dtypes[-1]


def _filled(part: SumPart, dtype: torch.dtype) -> Tensor | Symmetric:
    """Return a sum in a data type, zero where there is none."""
    value = part.value
    if value is None:
        value = torch.zeros(part.shape, dtype=dtype, device=part.device)
    value = value.to(dtype)
    return Symmetric(value) if part.symmetric else value

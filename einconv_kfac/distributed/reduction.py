"""Sums of tensors over workers, in few large messages."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.distributed.collectives import Collectives, wait
from einconv_kfac.distributed.short_floats import ShortSums, is_shortened, scale
from einconv_kfac.distributed.triangles import Packing, Symmetric

BUCKET_ENTRIES = 1 << 22
"""Entries of a message in which sums of large tensors are sent."""


class Reduction:
    """Sums of tensors over workers, each on one of them or on all.

    All workers make it, begin it, and ask for what was found, with the same signature.

    Args:
        tensors: The tensors.
        receivers: The worker that needs each sum; all for ``None``.
        collectives: The collectives of the workers.
        dtype: The data type in which matrices are sent, if it has fewer bits than theirs.

    Attributes:
        signature: Shapes, data types and receivers.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | Symmetric],
        receivers: Sequence[int | None],
        collectives: Collectives,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._tensors, self._receivers = tensors, receivers
        self._collectives, self._dtype = collectives, dtype
        self._short = [i for i, own in enumerate(tensors) if is_shortened(own, dtype)]
        own: list[tuple[int | None, int | None, Tensor | Symmetric]] = [
            (receivers[i], i, tensors[i]) for i in range(len(tensors)) if i not in {*self._short}
        ]
        own += [(None, None, scale(tensors[i])) for i in self._short]
        by_receiver: dict[int | None, list[tuple[int | None, Tensor | Symmetric]]]
        by_receiver = defaultdict(list)
        for receiver, index, tensor in own:
            by_receiver[receiver].append((index, tensor))
        self._indices = {r: [index for index, _ in found] for r, found in by_receiver.items()}
        self._packings = {r: Packing([t for _, t in found]) for r, found in by_receiver.items()}
        shapes = [(receiver, p.signature) for receiver, p in self._packings.items()]
        self.signature = shapes, self._short, str(dtype)
        self._works: list[Any] = []

    def begin_(self) -> None:
        """Begin to add up what is sent in its own data type."""
        self._works = [
            self._collectives.added_up_(part, receiver)
            for receiver, packing in self._packings.items()
            for buffer in packing.buffers
            for part in torch.split(buffer, BUCKET_ENTRIES)
        ]

    def wait(self) -> None:
        """Wait until nothing is sent any more."""
        for work in self._works:
            wait(work)

    def found(self) -> list[Tensor | None]:
        """Wait for the sums, and return them; ``None`` on workers that do not need them."""
        self.wait()
        found: list[Tensor | None] = [None] * len(self._tensors)
        scales: list[Tensor] = []
        for index, total in self._received():
            if index is None:
                scales.append(total)
            else:
                found[index] = total
        if self._short and self._dtype is not None:
            tensors = [self._tensors[i] for i in self._short]
            receivers = [self._receivers[i] for i in self._short]
            sums = ShortSums(tensors, receivers, scales, self._dtype, BUCKET_ENTRIES)
            for index, own in zip(self._short, sums.found(self._collectives)):
                found[index] = own
        return found

    def _received(self) -> Iterator[tuple[int | None, Tensor]]:
        """Yield the sums that this worker needs, with indices of tensors; scales have none."""
        for receiver, packing in self._packings.items():
            if receiver in (None, self._collectives.rank):
                yield from zip(self._indices[receiver], packing.unpacked())

"""Sums over workers of tensors that are sent in a data type of fewer bits.

Every worker rounds its tensors once, one worker adds them up in their own data type, and rounds the
sum once for all others. So an entry has two roundings, however many workers there are.

Rows and columns are divided by powers of two before, such that diagonals of matrices are about 1:
entries are then in the range of every data type, and powers of two do not round. Diagonals
themselves are sent in their own data type.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from einconv_kfac.distributed.collectives import Collectives, wait
from einconv_kfac.distributed.triangles import Packing, Symmetric


def is_shortened(tensor: Tensor | Symmetric, dtype: torch.dtype | None) -> bool:
    """Return whether a sum is sent in a data type: a matrix of entries with more bits."""
    own = _plain(tensor)
    return dtype is not None and own.ndim > 2 and torch.finfo(dtype).bits < _bits(own)


class ShortSums:
    """Sums of tensors over workers, each on one of them or on all, sent in fewer bits.

    Args:
        tensors: Positive semi-definite matrices ``[g, d, d]`` and tensors ``[g, co, d]`` that are
            not negative.
        receivers: The worker that needs each sum; all for ``None``.
        scales: The sums of `scale` over workers.
        dtype: The data type of messages.
        most: The most entries that a worker sends to another in one message.
    """

    def __init__(
        self,
        tensors: Sequence[Tensor | Symmetric],
        receivers: Sequence[int | None],
        scales: Sequence[Tensor],
        dtype: torch.dtype,
        most: int,
    ) -> None:
        self._tensors, self._scales, self._dtype, self._most = tensors, scales, dtype, most
        self._indices: dict[tuple[int | None, torch.dtype], list[int]] = defaultdict(list)
        for index, (tensor, receiver) in enumerate(zip(tensors, receivers)):
            self._indices[receiver, _plain(tensor).dtype].append(index)

    def found(self, collectives: Collectives) -> list[Tensor | None]:
        """Return the sums; ``None`` on workers that do not need them."""
        packings = {key: self._packing(own) for key, own in self._indices.items()}
        for dtype in sorted({dtype for _, dtype in packings}, key=str):
            for_all = packings.get((None, dtype))
            if for_all is not None:
                self._for_all_(for_all.buffers[0], collectives)
            owned = {r: p for (r, own), p in packings.items() if r is not None and own == dtype}
            if owned:
                empty = torch.empty(0, dtype=dtype, device=collectives.device)
                ranks = range(collectives.size)
                self._for_one_(
                    [owned[r].buffers[0] if r in owned else empty for r in ranks], collectives
                )
        found: list[Tensor | None] = [None] * len(self._tensors)
        for (receiver, _), packing in packings.items():
            if receiver in (None, collectives.rank):
                own = self._indices[receiver, packing.buffers[0].dtype]
                for index, total in zip(own, packing.unpacked()):
                    found[index] = self._restored(index, total)
        return found

    def _packing(self, indices: Sequence[int]) -> Packing:
        """Return scaled tensors in one buffer."""
        return Packing([_scaled(self._tensors[i], self._scales[i]) for i in indices])

    def _for_all_(self, buffer: Tensor, collectives: Collectives) -> None:
        """Replace a buffer by its sum, the same bits on all workers."""
        size = collectives.size
        for start in range(0, len(buffer), size * self._most):
            part = buffer[start : start + size * self._most]
            length = -(-len(part) // size)
            padded = torch.nn.functional.pad(part, (0, size * length - len(part)))
            total = self._added_up([*padded.view(size, length)], collectives).to(self._dtype)
            whole = total.new_empty(size, length)
            wait(collectives.collected_(whole, total))
            part.copy_(whole.flatten()[: len(part)])

    def _for_one_(self, buffers: Sequence[Tensor], collectives: Collectives) -> None:
        """Replace the buffer that this worker needs by its sum."""
        own = buffers[collectives.rank]
        for start in range(0, max(len(buffer) for buffer in buffers), self._most):
            parts = [buffer[start : start + self._most] for buffer in buffers]
            total = self._added_up(parts, collectives)
            own[start : start + self._most] = total

    def _added_up(self, parts: Sequence[Tensor], collectives: Collectives) -> Tensor:
        """Return the sum over workers of the part for this one, in its own data type."""
        own = parts[collectives.rank]
        received = own.new_empty(collectives.size, len(own), dtype=self._dtype)
        wait(collectives.exchanged_(received, [part.to(self._dtype) for part in parts]))
        return received.to(own.dtype).sum(0)

    def _restored(self, index: int, total: Tensor) -> Tensor:
        """Return a sum of scaled tensors without their scale, and with its diagonal."""
        tensor, scale = self._tensors[index], self._scales[index]
        if isinstance(tensor, Symmetric):
            root = _power_of_two(scale, 2)
            total = total / root[..., None] / root[..., None, :]
            total.diagonal(dim1=-2, dim2=-1).copy_(scale)
            return total
        return total / _power_of_two(scale, 1)[..., None]


def scale(tensor: Tensor | Symmetric) -> Tensor:
    """Return the diagonals of matrices, ``[g, d]``, or the largest entries of rows, ``[g, co]``."""
    if isinstance(tensor, Symmetric):
        return tensor.matrices.diagonal(dim1=-2, dim2=-1).clone()
    return tensor.amax(-1)


def _scaled(tensor: Tensor | Symmetric, total: Tensor) -> Tensor | Symmetric:
    """Return a tensor whose sum over workers has entries of at most about 1, given its scale."""
    if isinstance(tensor, Symmetric):
        root = _power_of_two(total, 2)
        return Symmetric(tensor.matrices * root[..., None] * root[..., None, :])
    return tensor * _power_of_two(total, 1)[..., None]


def _power_of_two(totals: Tensor, root: int) -> Tensor:
    """Return powers of two near the reciprocals of roots of numbers; 1 for zero."""
    exponents = torch.frexp(totals).exponent
    halves = torch.div(-exponents, root, rounding_mode="floor").clamp(-120, 120)
    return torch.where(totals > 0, torch.ldexp(torch.ones_like(totals), halves), 1.0)


def _plain(tensor: Tensor | Symmetric) -> Tensor:
    return tensor.matrices if isinstance(tensor, Symmetric) else tensor


def _bits(tensor: Tensor) -> int:
    return torch.finfo(tensor.dtype).bits

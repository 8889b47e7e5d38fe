"""Tensors packed into few large buffers; of symmetric matrices, one triangle is sent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def folded(matrices: Tensor) -> Tensor:
    """Return the upper triangles of symmetric matrices ``[g, d, d]`` as ``[g, h, d + 1]``.

    With ``h = ceil(d / 2)``, row ``i`` of the result is row ``i`` of the triangle, with ``d - i``
    entries, behind row ``d - 1 - i`` in reverse order, with ``i + 1`` entries.
    """
    half = (matrices.shape[-1] + 1) // 2
    upper = matrices[..., :half, :].triu()
    lower = matrices.flip(-2, -1)[..., :half, :].tril()
    result = matrices.new_zeros(*matrices.shape[:-2], half, matrices.shape[-1] + 1)
    result[..., 1:] = upper
    result[..., :-1] += lower
    return result


def unfolded(rows: Tensor) -> Tensor:
    """Return the symmetric matrices ``[g, d, d]`` of `folded` triangles."""
    size, half = rows.shape[-1] - 1, rows.shape[-2]
    triangle = rows.new_zeros(*rows.shape[:-2], size, size)
    triangle[..., size - half :, :] = rows[..., :-1].tril().flip(-2, -1)
    triangle[..., :half, :] = rows[..., 1:].triu()
    result: Tensor = triangle + triangle.triu(1).mT
    return result


@dataclass(frozen=True)
class Symmetric:
    """Symmetric matrices, of which one triangle is sent.

    Args:
        matrices: The matrices, ``[g, d, d]``.
    """

    matrices: Tensor


class Packing:
    """Tensors in one buffer for each of their data types.

    Args:
        tensors: The tensors; of `Symmetric` ones, triangles are packed.

    Attributes:
        buffers: The buffers, of one dimension.
        signature: Shapes and data types, which the packings of all workers share.
    """

    def __init__(self, tensors: Sequence[Tensor | Symmetric]) -> None:
        self._symmetric = [isinstance(tensor, Symmetric) for tensor in tensors]
        parts = [folded(t.matrices) if isinstance(t, Symmetric) else t for t in tensors]
        self._shapes = [part.shape for part in parts]
        by_dtype: dict[torch.dtype, list[int]] = defaultdict(list)
        for index, part in enumerate(parts):
            by_dtype[part.dtype].append(index)
        self._indices = list(by_dtype.values())
        self.buffers = [torch.cat([parts[i].flatten() for i in own]) for own in self._indices]
        self.signature = [(tuple(part.shape), str(part.dtype)) for part in parts]

    def unpacked(self) -> list[Tensor]:
        """Return the tensors that the buffers hold now."""
        found: dict[int, Tensor] = {}
        for buffer, own in zip(self.buffers, self._indices):
            sizes = [self._shapes[index].numel() for index in own]
            found |= dict(zip(own, torch.split(buffer, sizes)))
        parts = [found[index].view(shape) for index, shape in enumerate(self._shapes)]
        return [unfolded(p) if s else p.clone() for p, s in zip(parts, self._symmetric)]

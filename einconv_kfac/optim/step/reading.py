"""Numbers on the device that the host reads together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.late_numbers import LateNumbers
from einconv_kfac.curvature.devices.sending import sent


class Unread:
    """Entries of small tensors that the host is going to read.

    On a GPU, what is asked of the device before the host reads them keeps it busy meanwhile. On
    other devices they are read at once, and no tensor is kept.

    Args:
        parts: Real tensors on one device; those without entries may be anywhere.

    Attributes:
        is_late: Whether they are on a GPU.
    """

    def __init__(self, *parts: Tensor) -> None:
        numbers, self._sizes = _joined(parts)
        self.is_late = numbers.is_cuda
        self._numbers = LateNumbers(numbers) if self.is_late else numbers.tolist()

    def read(self) -> list[list[float]]:
        """Return the entries of each tensor."""
        own = iter(self._numbers if isinstance(self._numbers, list) else self._numbers.read())
        return [[next(own) for _ in range(size)] for size in self._sizes]


def read(*parts: Tensor) -> list[list[float]]:
    """Return the entries of small tensors as numbers; the host waits for the device once.

    Args:
        parts: Real tensors on one device; those without entries may be anywhere.
    """
    numbers, sizes = _joined(parts)
    own = iter(numbers.tolist())
    return [[next(own) for _ in range(size)] for size in sizes]


def _joined(parts: Sequence[Tensor]) -> tuple[Tensor, list[int]]:
    """Return the entries of tensors as one vector, and how many each has."""
    flat = [part.detach().reshape(-1).double() for part in parts]
    known = [part for part in flat if part.numel()]
    return torch.cat(known) if known else flat[0], [part.numel() for part in flat]


def sent_rows(rows: Sequence[Sequence[float]], like: Tensor) -> Sequence[Tensor]:
    """Return vectors of one length on the device of a tensor; the host does not wait.

    Args:
        rows: The vectors.
        like: A tensor of the data type and the device.
    """
    return sent(torch.tensor(rows, dtype=like.dtype), like.device).unbind()

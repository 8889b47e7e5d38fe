"""Numbers that the host reads while a GPU goes on with what it was asked for after them."""

from __future__ import annotations

import torch
from torch import Tensor


class LateNumbers:
    """Numbers that are copied to the host while the device goes on.

    Args:
        numbers: A vector on the device.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        self._host.copy_(numbers, non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record()

    def read(self) -> list[float]:
        """Return the numbers; the host waits for what was asked of the device before them."""
        self._copied.synchronize()
        found: list[float] = self._host.tolist()
        return found

"""Numbers on the device that the host reads together."""

from __future__ import annotations

import torch
from torch import Tensor


def read(*parts: Tensor) -> list[list[float]]:
    """Return the entries of small tensors as numbers; the host waits for the device once.

    Args:
        parts: Real tensors on one device; those without entries may be anywhere.
    """
    flat = [part.detach().reshape(-1).double() for part in parts]
    known = [part for part in flat if part.numel()]
    numbers = iter(torch.cat(known).tolist() if known else ())
    return [[next(numbers) for _ in range(part.numel())] for part in flat]

"""Tensors of the host that a GPU gets without the host waiting."""

from __future__ import annotations

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host on a device; the host does not wait for a GPU.

    Args:
        tensor: The tensor, which is small: it is copied to memory that a GPU reads by itself.
        device: The device.
    """
    if device.type != "cuda":
        return tensor.to(device)
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    pinned.copy_(tensor)
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
    return found.copy_(pinned, non_blocking=True)

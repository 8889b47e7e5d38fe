"""Autocast: its state for a device, and contractions outside of it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.amp.autocast_mode import is_autocast_available

from einconv_kfac.evaluate.kernels.selection import contract
from einconv_kfac.geometry import Geometry


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is on for a device; devices without autocast have it off."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = device.type
    return is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def contract_as_given(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Contract in the tensors' own type; a backward pass has the types of its forward pass."""
    if not autocast_is_on(first.device):
        return contract(geometry, role, first, second)
    with torch.autocast(first.device.type, enabled=False):
        return contract(geometry, role, first, second)

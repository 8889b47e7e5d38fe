"""The state of autocast for a device."""

from __future__ import annotations

import torch
from torch.amp.autocast_mode import is_autocast_available


def autocast_is_on(device: torch.device) -> bool:
    """Return whether autocast is on for a device; devices without autocast have it off."""
    if not torch._C._is_any_autocast_enabled():
        return False
    kind = device.type
    return is_autocast_available(kind) and torch.is_autocast_enabled(kind)

"""Whether torch records operations in a graph, and whether it transforms them."""

from __future__ import annotations

import torch


def is_recorded() -> bool:
    """Return whether operations are compiled, or seen by a mode that traces or counts them."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Return whether forward mode or a transform of ``torch.func`` is active."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()

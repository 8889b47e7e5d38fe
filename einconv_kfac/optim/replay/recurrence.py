"""Recurrent layers with forward-mode derivatives and differentiable backward passes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn


def native_recurrence(module: nn.Module) -> Callable[..., Any] | None:
    """Return a forward method made of torch's native operations for a recurrent layer.

    The implementations of oneDNN and cuDNN have no forward mode and can be differentiated only
    once. For other modules, return ``None``.
    """
    return partial(_native, module) if isinstance(module, nn.RNNBase) else None


def _native(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a recurrent layer, computed without oneDNN and cuDNN."""
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of Intel GPUs
    torch._C._set_cudnn_enabled(False)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)

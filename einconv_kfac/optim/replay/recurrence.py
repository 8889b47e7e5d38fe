"""Recurrent layers with forward-mode derivatives and differentiable backward passes."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import nn

from einconv_kfac.optim.replay.substitution import Forwards


def native_recurrences(modules: Collection[nn.Module]) -> Forwards:
    """Return forward methods of recurrent layers among modules, made of torch's native operations.

    The implementations of oneDNN and cuDNN have no forward mode and can be differentiated only
    once.
    """
    return {m: partial(_native, m) for m in modules if isinstance(m, nn.RNNBase)}


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

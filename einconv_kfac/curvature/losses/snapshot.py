"""Copies of a loss module and of small tensors as they are at a call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

LARGEST_COPY = 1 << 16
"""Entries of a tensor up to which it is copied, so that a script may change it in place."""


def snapshot(loss_fn: nn.Module) -> nn.Module:
    """Return a copy of a loss with its present attributes and buffers; parameters are shared.

    A training loop may set class weights anew for every batch.
    """
    own = object.__new__(type(loss_fn))
    state = vars(own)
    state.update(vars(loss_fn))
    state["_buffers"] = {
        name: None if buffer is None else buffer.clone() for name, buffer in own._buffers.items()
    }
    state["_modules"] = {
        name: None if module is None else snapshot(module) for name, module in own._modules.items()
    }
    return own


def copied(value: Any) -> Any:
    """Return a copy of a small tensor that needs no gradient; any other value itself.

    Scripts change targets, weights and masks in place after the backward pass, to fill them anew.
    """
    if not isinstance(value, Tensor) or type(value) not in (Tensor, nn.Parameter):
        return value
    if value.requires_grad or value.numel() > LARGEST_COPY or value.layout != torch.strided:
        return value
    return value if value.is_inference() else value.detach().clone()


def copied_arguments(values: Any) -> Any:
    """Return arguments of a call as they are now, in tuples, lists and dictionaries of their own.

    For tensors see `copied`.
    """
    return tree_map(copied, values)

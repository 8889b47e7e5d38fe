"""A copy of a loss module as it is at a call."""

from __future__ import annotations

from torch import nn


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

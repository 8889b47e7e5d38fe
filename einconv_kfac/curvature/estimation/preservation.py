"""Preservation of a model's buffers and of torch's random state; the mode of autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def without_inference_mode() -> Iterator[None]:
    """Leave ``torch.inference_mode`` inside the block, whose tensors have no backward pass."""
    if not torch.is_inference_mode_enabled():
        yield
        return
    with torch.inference_mode(mode=False):
        yield


def without_gradients(function: Function) -> Function:
    """Return a function that runs uncompiled, outside of inference mode and without gradients."""

    @torch._disable_dynamo  # type: ignore[attr-defined]
    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with without_inference_mode(), torch.no_grad():
            return function(*args, **kwargs)

    return cast("Function", run)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Restore a model's buffers and the global random state after the block.

    It runs outside of inference mode.

    Args:
        model: The model, for example with batch-norm statistics.
    """
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    devices = {buffer.device for *_, buffer in buffers} | {p.device for p in model.parameters()}
    cuda = [device for device in devices if device.type == "cuda"]
    with torch.random.fork_rng(devices=cuda), without_inference_mode():
        try:
            yield
        finally:
            with torch.no_grad():
                for module, name, buffer, saved in buffers:
                    buffer.copy_(saved)
                    module._buffers[name] = buffer

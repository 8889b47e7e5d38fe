"""Checks of the arguments ``model`` and ``loss_fn``."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from einconv_kfac.curvature.arguments import described


def check_module(model: Any, line: str) -> None:
    """Raise a ``TypeError`` if a model is no module, or one that TorchScript compiled.

    Args:
        model: The argument ``model``.
        line: The line to write.
    """
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be the nn.Module itself, not its parameters or its class, got "
            f"{described(model)}. Write {line}; several modules are one as "
            "nn.ModuleList([first, second])."
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            "`model` must be a module in Python, got one that TorchScript compiled, which shows no "
            f"calls of its layers. Write {line} with the module that was passed to "
            "`torch.jit.script` or `torch.jit.trace`, call that, and compile it after training."
        )


def check_loss(loss_fn: Any) -> None:
    """Raise a ``TypeError`` if a loss is neither a module nor a function nor ``None``.

    Args:
        loss_fn: The argument ``loss_fn``.
    """
    is_class = isinstance(loss_fn, type)
    if loss_fn is not None and (is_class or not callable(loss_fn)):
        instance = f"{loss_fn.__name__}()" if is_class else "nn.CrossEntropyLoss()"
        raise TypeError(
            "`loss_fn` must be a loss module, a function of output and target, or None, got "
            f"{described(loss_fn)}. Pass {instance}."
        )

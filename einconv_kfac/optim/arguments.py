"""Checks of arguments of optimizers: each raises with argument, rule and value."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from einconv_kfac.curvature.arguments import described, shown
from einconv_kfac.curvature.module_arguments import check_module
from einconv_kfac.distributed.detection import stored_model

COMMUNICATION_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64


def communication_dtype_of(value: Any) -> torch.dtype | None:
    """Return the argument ``communication_dtype``.

    Raises:
        ValueError: If it is neither ``None`` nor a data type that entries are rounded to.
    """
    if value is not None and not any(value is dtype for dtype in COMMUNICATION_DTYPES):
        names = ", ".join(str(dtype) for dtype in COMMUNICATION_DTYPES)
        raise ValueError(
            f"`communication_dtype` must be None or one of {names}, got {shown(value)}. Leave it "
            "out to send factors in their own data type."
        )
    found: torch.dtype | None = value
    return found


def check_trainable(model: Any, loss_fn: Any, owner: str) -> None:
    """Raise an error if a model cannot be trained with a loss.

    Args:
        model: The argument ``model``.
        loss_fn: The argument ``loss_fn``.
        owner: Name of the class that takes them.
    """
    check_model(model, owner)
    if loss_fn is not None:
        check_loss_module(loss_fn, owner)
    stored_model(model)


def check_model(model: Any, owner: str) -> None:
    """Raise a ``TypeError`` if a model is no module, or a ``ValueError`` if it has no parameters.

    Args:
        model: The argument ``model``.
        owner: Name of the class that takes it, for the line to write.
    """
    check_module(model, f"{owner}(model, nn.CrossEntropyLoss())")
    if next(model.parameters(), None) is None:
        raise ValueError(
            f"`model` must have parameters, got {type(model).__name__}, an optimizer got an empty "
            "parameter list. Run lazy modules once before."
        )


def check_loss_module(loss_fn: Any, owner: str) -> None:
    """Raise a ``TypeError`` if a loss is not an instance of a module.

    Args:
        loss_fn: The argument ``loss_fn``.
        owner: Name of the class that takes it, for the line to write.

    Raises:
        ValueError: If its class has a ``__call__`` in the place of a ``forward``.
    """
    if isinstance(loss_fn, nn.Module):
        if getattr(loss_fn.forward, "__func__", None) is not nn.Module.forward:
            return
        raise ValueError(
            f"`loss_fn` must have a `forward`, whose calls torch shows to hooks, got "
            f"{type(loss_fn).__name__} without one. Write {owner}(model), and "
            "`loss = opt.observe(loss)` before `loss.backward()`."
        )
    line = f"Write {owner}(model, nn.CrossEntropyLoss()), with the loss module of your loop"
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        line = f"Write {owner}(model, {loss_fn.__name__}()), and call that instance in your loop"
    else:
        line += f", or {owner}(model), and `loss = opt.observe(loss)` before `loss.backward()`"
    raise TypeError(
        f"`loss_fn` must be a loss module, an instance, got {described(loss_fn)}. {line}."
    )

"""Checks of arguments: each returns plain Python, or raises with argument, rule and value."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Integral, Real
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from einconv_kfac.distributed.detection import stored_model

LARGEST_INTEGER = 2**63
"""Integers from here on do not fit a tensor's operations."""
COMMUNICATION_DTYPES = torch.float16, torch.bfloat16, torch.float32, torch.float64
SEED_BOUNDS = (-(2**63), 2**64)
"""Bounds of a seed, of `torch.Generator.manual_seed`."""
_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)


def plain(value: Any) -> Any:
    """Return a tensor with one element, or another library's scalar, as a Python number."""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        return value.item()
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def in_range(name: str, value: Any, *, below: float = math.inf, positive: bool = False) -> float:
    """Return a number in ``[0, below)``, or in ``(0, below)``.

    Raises:
        ValueError: If it is not one.
    """
    number = plain(value)
    if not _is_number(number) or not 0 <= number < below or (positive and number == 0):
        rule = f"in {'(' if positive else '['}0, {below})"
        raise ValueError(f"`{name}` must be a number {rule}, got {shown(value)}.")
    return float(number) if abs(number) >= LARGEST_INTEGER else number


def fraction(name: str, value: Any) -> float:
    """Return a number in ``(0, 1]``.

    Raises:
        ValueError: If it is not one.
    """
    number = plain(value)
    if not _is_number(number) or not 0 < number <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1], got {shown(value)}.")
    return float(number)


def positive_integer(name: str, value: Any) -> int:
    """Return a positive integer.

    Raises:
        ValueError: If it is not one.
    """
    number = plain(value)
    if not _is_integer(number) or number < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {shown(value)}.")
    return int(number)


def seed_value(value: Any) -> int:
    """Return the argument ``seed``.

    Raises:
        ValueError: If it is not an integer that a random generator takes.
    """
    number, (lowest, end) = plain(value), SEED_BOUNDS
    if not _is_integer(number) or not lowest <= number < end:
        raise ValueError(f"`seed` must be an integer in [-2^63, 2^64), got {shown(value)}.")
    return int(number)


def flag(name: str, value: Any) -> bool:
    """Return ``True`` or ``False``.

    Raises:
        ValueError: If it is neither.
    """
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be True or False, got {shown(value)}.")
    return value


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


def choice(name: str, value: Any, choices: Sequence[str]) -> str:
    """Return one of several names.

    Raises:
        ValueError: If it is none of them.
    """
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"`{name}` must be one of {tuple(choices)}, got {shown(value)}.")
    return value


def callback(name: str, value: Any) -> Any:
    """Return a function, or ``None``.

    Raises:
        ValueError: If it cannot be called.
    """
    if value is not None and not callable(value):
        raise ValueError(f"`{name}` must be a function or None, got {shown(value)}.")
    return value


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
    if isinstance(model, type) or not isinstance(model, nn.Module):
        raise TypeError(
            f"`model` must be the nn.Module itself, not its parameters or its class, got "
            f"{_described(model)}. Write {owner}(model, nn.CrossEntropyLoss())."
        )
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
    """
    if isinstance(loss_fn, nn.Module):
        return
    line = f"Write {owner}(model, nn.CrossEntropyLoss()), with the loss module of your loop"
    if isinstance(loss_fn, type) and issubclass(loss_fn, nn.Module):
        line = f"Write {owner}(model, {loss_fn.__name__}()), and call that instance in your loop"
    else:
        line += f", or {owner}(model), and `loss = opt.observe(loss)` before `loss.backward()`"
    raise TypeError(
        f"`loss_fn` must be a loss module, an instance, got {_described(loss_fn)}. {line}."
    )


def shown(value: Any) -> str:
    """Return a value for an error, shortened."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value)


def _described(value: Any) -> str:
    """Return what an argument is, in words."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _FUNCTIONS):
        return f"the function {value.__name__}"
    if value is None or isinstance(value, (str, int, float)):
        return shown(value)
    return f"a {type(value).__name__}"


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)

"""Checks of arguments: each returns plain Python, or raises with argument, rule and value."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Sequence
from numbers import Integral, Real
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any, TypeGuard

import torch
from torch import Generator, Tensor

MULTIPLIER_END = 1e38
"""Multipliers are smaller: float32 ends there."""
LARGEST_INTEGER = 2**31
"""Integers from here on become floats: their squares do not fit a tensor's operations."""
NUMBER_END = 1e18
"""Hyper-parameters are below it: their squares, and those of gradients, are finite in float32."""
LEAST_DAMPING = 1e-30
"""Smallest damping that is not zero: its root, and the root's reciprocal, are finite in float32."""
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
    try:
        return float(value) if isinstance(value, Real) else value
    except OverflowError:  # a fraction of huge integers
        return math.inf


def in_range(name: str, value: Any, *, below: float = NUMBER_END, positive: bool = False) -> float:
    """Return a number in ``[0, below)``, or in ``(0, below)``.

    Raises:
        ValueError: If it is not one.
    """
    number = plain(value)
    if not _is_number(number) or not 0 <= number < below or (positive and number == 0):
        rule = f"in {'(' if positive else '['}0, {below})"
        raise ValueError(f"`{name}` must be a number {rule}, got {shown(value)}.")
    return float(number) if number >= LARGEST_INTEGER else number


def given_damping(value: Any) -> float:
    """Return a positive damping of an optimizer.

    Raises:
        ValueError: If it is none, or its root is zero or infinite in float32.
    """
    number = plain(value)
    if not _is_number(number) or not LEAST_DAMPING <= number < NUMBER_END:
        rule = f"in [{LEAST_DAMPING}, {NUMBER_END})"
        raise ValueError(f"`damping` must be a number {rule}, got {shown(value)}.")
    return float(number) if number >= LARGEST_INTEGER else number


def fraction(name: str, value: Any) -> float:
    """Return a number in ``(0, 1]``.

    Raises:
        ValueError: If it is not one.
    """
    number = plain(value)
    if not _is_number(number) or not 0 < number <= 1:
        raise ValueError(f"`{name}` must be a number in (0, 1], got {shown(value)}.")
    return float(number)


def positive_integer(name: str, value: Any, *, below: float = math.inf) -> int:
    """Return a positive integer.

    Raises:
        ValueError: If it is not one, or not below a bound.
    """
    number = plain(value)
    if not _is_integer(number) or not 1 <= number < below:
        bound = "" if below == math.inf else f" below {below}"
        raise ValueError(f"`{name}` must be a positive integer{bound}, got {shown(value)}.")
    return int(number)


def sizes(name: str, value: Any) -> tuple[int, ...]:
    """Return integers that are not negative, as a shape.

    Raises:
        ValueError: If they are none.
    """
    is_list = isinstance(value, (tuple, list))
    if not is_list or not all(_is_integer(size) and 0 <= size < LARGEST_INTEGER for size in value):
        raise ValueError(
            f"`{name}` must be a tuple of integers in [0, {LARGEST_INTEGER}), got {shown(value)}."
        )
    return tuple(value)


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


def number(name: str, value: Any, *, finite: bool = True) -> float:
    """Return a number of any sign.

    Args:
        name: Name of the argument.
        value: The argument.
        finite: Whether it must be finite. A loss that is not makes multipliers of factors NaN.

    Raises:
        ValueError: If it is not one, or does not fit float32.
    """
    found = value if type(value) is float else plain(value)
    is_rest = not finite and isinstance(found, float) and not math.isfinite(found)
    if not _is_number(found) or not (is_rest or abs(found) < MULTIPLIER_END):
        raise ValueError(
            f"`{name}` must be a {'finite' if finite else 'real'} number, below {MULTIPLIER_END} "
            f"in size, got {shown(value)}."
        )
    is_huge = isinstance(found, int) and abs(found) >= LARGEST_INTEGER
    return float(found) if is_huge else found


def checked_damping(damping: Any) -> Any:
    """Return a damping; a tensor of one number stays one.

    Raises:
        ValueError: If it is negative, or does not fit float32.
    """
    found = plain(damping)
    if not _is_number(found) or not 0 <= found < MULTIPLIER_END:
        raise ValueError(
            f"`damping` must be a finite number >= 0, got {shown(damping)}. float32 ends at "
            f"{MULTIPLIER_END}."
        )
    return damping if isinstance(damping, Tensor) else float(found)


def names_of(name: str, value: Any) -> list[str]:
    """Return names, given as a collection of them.

    Raises:
        ValueError: If it is not one; a single name is none.
    """
    is_collection = isinstance(value, Collection) and not isinstance(value, (str, bytes, Tensor))
    if not is_collection or not all(isinstance(entry, str) for entry in value):
        raise ValueError(f"`{name}` must be a collection of names, got {shown(value)}.")
    return list(value)


def real_tensor(name: str, value: Any) -> Tensor:
    """Return a dense tensor of real floating-point numbers.

    Raises:
        TypeError: If it is no tensor.
        ValueError: If it is sparse, or of another data type.
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {shown(value)}.")
    if value.layout != torch.strided or not value.is_floating_point():
        is_dense = value.layout == torch.strided
        found = value.dtype if is_dense else f"a sparse tensor ({value.layout})"
        raise ValueError(
            f"`{name}` must be a dense tensor of real floating-point numbers, got {found}."
        )
    return value


def random_generator(name: str, value: Any) -> Generator | None:
    """Return a random generator, or ``None`` for the global one.

    Raises:
        ValueError: If it is neither.
    """
    if value is not None and not isinstance(value, Generator):
        raise ValueError(f"`{name}` must be a torch.Generator or None, got {shown(value)}.")
    return value


def check_batches(name: str, value: Any) -> None:
    """Raise a ``TypeError`` if batches cannot be iterated over.

    Args:
        name: Name of the argument.
        value: The argument.
    """
    is_scalar = getattr(value, "ndim", None) == 0
    can_iterate = hasattr(value, "__iter__") or hasattr(value, "__getitem__")
    if is_scalar or isinstance(value, (type, str, bytes)) or not can_iterate:
        raise TypeError(
            f"`{name}` must be batches (x, y), a list or a data loader, got {described(value)}."
        )


def shown(value: Any) -> str:
    """Return a value for an error, shortened."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {value.dtype}"
    return reprlib.repr(value)


def described(value: Any) -> str:
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

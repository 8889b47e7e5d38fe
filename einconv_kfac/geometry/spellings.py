"""Torch's spellings of sizes and paddings: a number, numbers, pairs or a word."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

Sizes: TypeAlias = int | Sequence[int]
"""One number for all dimensions, or one per dimension."""

Padding: TypeAlias = int | str | Sequence[int | tuple[int, int]]
"""One number, one number or ``(left, right)`` pair per dimension, or a word."""

LARGEST_SIZE = 2**31 - 1
"""Largest size and hyper-parameter of a convolution."""

LARGEST_POSITIONS = 2**48
"""Largest number of positions over all dimensions; no processor addresses a tensor of more."""


def is_integer(value: object) -> bool:
    """Return whether a value is an integer of Python, NumPy or a graph's sizes, and no truth."""
    if isinstance(value, int):
        return not isinstance(value, bool)
    return isinstance(value, Integral) or type(value).__name__ == "SymInt"


def as_integer(value: Any, name: str, minimum: int | None = None) -> int:
    """Return a value that must be an integer.

    Raises:
        TypeError: If it is none.
        ValueError: If it is below ``minimum``, or above `LARGEST_SIZE`.
    """
    if type(value) is int and (minimum is None or value >= minimum) and value <= LARGEST_SIZE:
        return value  # the common case first: geometries are built for every call of `unfoldNd`
    if not is_integer(value):
        raise TypeError(f"`{name}` must be an integer, got {value!r}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"`{name}` must be at least {minimum}, got {value}.")
    _check_largest((value,), name, value)
    return int(value) if isinstance(value, Integral) else value


def is_list(value: object) -> bool:
    """Return whether a value is a sequence, and no word."""
    if type(value) is tuple or type(value) is list:
        return True
    return isinstance(value, (tuple, list, Sequence)) and not isinstance(value, (str, bytes))


def as_flag(value: Any, name: str) -> bool:
    """Return a value that must be true or false, and no other.

    Raises:
        TypeError: If it is another.
    """
    if value is True or value is False:
        return value
    raise TypeError(f"`{name}` must be True or False, got {value!r}.")


def as_sizes(value: Any, name: str, minimum: int = 1) -> tuple[int, ...]:
    """Return integers, one per dimension; a number is one dimension.

    Raises:
        TypeError: If the value is neither an integer nor a sequence of integers.
        ValueError: If there is no entry, or one is below ``minimum`` or above `LARGEST_SIZE`.
    """
    if type(value) is int and minimum <= value <= LARGEST_SIZE:
        return (value,)
    sizes = tuple(value) if is_list(value) else (value,)
    if sizes and all(type(size) is int and minimum <= size <= LARGEST_SIZE for size in sizes):
        return sizes
    if not sizes:
        raise ValueError(f"`{name}` must have at least one dimension, got {value!r}.")
    if not all(map(is_integer, sizes)):
        raise TypeError(f"`{name}` must be an integer or integers, got {value!r}.")
    if any(size < minimum for size in sizes):
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}.")
    _check_largest(sizes, name, value)
    return tuple(as_integer(size, name) for size in sizes)


def _check_largest(sizes: tuple[int, ...], name: str, value: object) -> None:
    """Raise a ``ValueError`` if an integer is above `LARGEST_SIZE`; sizes of a graph are not."""
    if any(isinstance(size, Integral) and size > LARGEST_SIZE for size in sizes):
        raise ValueError(f"`{name}` must be at most {LARGEST_SIZE}, got {reprlib.repr(value)}.")


def per_dimension(value: Sizes, ndim: int, name: str, minimum: int = 1) -> tuple[int, ...]:
    """Return ``value`` as one integer per dimension.

    Raises:
        ValueError: If it has another length, or an entry below ``minimum`` or above
            `LARGEST_SIZE`.
        TypeError: If an entry is not an integer.
    """
    as_integer(ndim, "ndim", minimum=1)
    as_integer(minimum, "minimum")
    sizes = as_sizes(value, name, minimum)
    sizes = sizes * ndim if len(sizes) == 1 else sizes
    if len(sizes) != ndim:
        raise ValueError(f"`{name}` must have one entry per dimension ({ndim}), got {value!r}.")
    return sizes


def window_sizes(
    kernel_size: Sizes, stride: Sizes, dilation: Sizes, ndim: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return kernel size, stride and dilation per dimension; see `per_dimension`."""
    return (
        per_dimension(kernel_size, ndim, "kernel_size"),
        per_dimension(stride, ndim, "stride"),
        per_dimension(dilation, ndim, "dilation"),
    )


def same_padding(kernel_size: Sizes, dilation: Sizes, ndim: int) -> tuple[tuple[int, int], ...]:
    """Return the padding that keeps the size at stride one.

    It is ``D (K - 1)`` in total per dimension, with the smaller half on the left.
    """
    kernel = per_dimension(kernel_size, ndim, "kernel_size")
    steps = per_dimension(dilation, ndim, "dilation")
    totals = [d * (k - 1) for k, d in zip(kernel, steps)]
    return tuple((total // 2, total - total // 2) for total in totals)


def parse_padding(padding: Padding, ndim: int) -> tuple[tuple[int, int], ...]:
    """Return numeric padding as ``(left, right)`` per dimension.

    Raises:
        ValueError: If it is a word, has another length than ``ndim``, or is negative.
        TypeError: If an entry is not an integer.
    """
    as_integer(ndim, "ndim", minimum=1)
    if isinstance(padding, str):
        raise ValueError(f"`padding` must be 'same', 'valid' or numbers, got {padding!r}.")
    if not is_list(padding) and not is_integer(padding):
        raise TypeError(f"`padding` must be 'same', 'valid' or integers, got {padding!r}.")
    entries: tuple[Any, ...] = tuple(padding) if is_list(padding) else (padding,)  # type: ignore[arg-type]
    entries = entries * ndim if len(entries) == 1 else entries
    if len(entries) != ndim:
        raise ValueError(f"`padding` must have one entry per dimension ({ndim}), got {padding!r}.")
    pairs = (entry if isinstance(entry, (tuple, list)) else (entry, entry) for entry in entries)
    sides = [per_dimension(tuple(pair), 2, "padding", minimum=0) for pair in pairs]
    return tuple((left, right) for left, right in sides)


class NoSize:
    """A value that is no size and no word, hashed by its identity; checks name the value."""

    def __init__(self, value: object) -> None:
        """Keep the value."""
        self.value = value

    def __repr__(self) -> str:
        return repr(self.value)


def hashable(value: Any) -> Any:
    """Return a spelling as a key of a cache: integers and tuples of them, nested ones too.

    Equal keys have equal meanings: a truth or a float does not become the integer that it equals.
    """
    kind = type(value)
    if kind is int or kind is str or value is None:
        return value
    if is_list(value):
        for entry in value:
            if type(entry) is not int:
                return tuple(map(hashable, value))
        return tuple(value)
    return as_integer(value, "value") if is_integer(value) else NoSize(value)

"""Torch's spellings of sizes and paddings: a number, numbers, pairs or a word."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

Sizes: TypeAlias = int | Sequence[int]
"""One number for all dimensions, or one per dimension."""

Padding: TypeAlias = int | str | Sequence[int | tuple[int, int]]
"""One number, one number or ``(left, right)`` pair per dimension, or a word."""


def per_dimension(value: Sizes, ndim: int, name: str, minimum: int = 1) -> tuple[int, ...]:
    """Return ``value`` as one integer per dimension.

    Raises:
        ValueError: If it has another length or an entry below ``minimum``.
        TypeError: If an entry is not an integer.
    """
    if not isinstance(value, (int, Sequence)):
        raise TypeError(f"`{name}` must be an integer or integers, got {value!r}.")
    sizes = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(sizes) == 1:
        sizes = sizes * ndim
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"`{name}` must be an integer or integers, got {value!r}.")
    if len(sizes) != ndim:
        raise ValueError(f"`{name}` must have one entry per dimension ({ndim}), got {value!r}.")
    if any(size < minimum for size in sizes):
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}.")
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
    if isinstance(padding, str):
        raise ValueError(f"`padding` must be 'same', 'valid' or numbers, got {padding!r}.")
    entries: tuple[Any, ...] = (padding,) if isinstance(padding, int) else tuple(padding)
    entries = entries * ndim if len(entries) == 1 else entries
    if len(entries) != ndim:
        raise ValueError(f"`padding` must have one entry per dimension ({ndim}), got {padding!r}.")
    pairs = (entry if isinstance(entry, (tuple, list)) else (entry, entry) for entry in entries)
    sides = [per_dimension(tuple(pair), 2, "padding", minimum=0) for pair in pairs]
    return tuple((left, right) for left, right in sides)


def hashable(value: Any) -> Any:
    """Turn lists into tuples, nested ones too."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        hash(value)
    except TypeError:
        return tuple(map(hashable, value))
    return value

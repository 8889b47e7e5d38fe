"""Padding of an input by torch's padding modes, in any dimension."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def pad_input(x: Tensor, padding: Sequence[tuple[int, int]], mode: str = "zeros") -> Tensor:
    """Pad the last dimensions of ``x``.

    Args:
        x: Tensor of shape ``[..., *i]``.
        padding: Number of positions to add left and right, for each of the dimensions ``i``.
        mode: One of `PADDING_MODES`, as in ``torch.nn.Conv2d``.

    Returns:
        Tensor of shape ``[..., *(left + i + right)]``.

    Raises:
        ValueError: If the mode is unknown, or the input is too small to be reflected
            (``padding < i``) or wrapped (``padding <= i``).
    """
    if mode not in PADDING_MODES:
        raise ValueError(f"`padding_mode` must be one of {PADDING_MODES}, got {mode!r}.")
    if mode == "zeros":
        return padded(x, padding)
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        return functional.pad(x, list(chain(*reversed(padding))), mode=mode)
    for dim, (left, right) in enumerate(padding, start=x.ndim - len(padding)):
        if left or right:
            x = x.index_select(dim, _source_positions(x, dim, (left, right), mode))
    return x


def padded(x: Tensor, sides: Sequence[tuple[int, int]]) -> Tensor:
    """Pad the last dimensions with zeros; negative sides are cropped, without a copy.

    A side may be cropped by more than the size; then the zeros of the other side are cropped.
    """
    added: list[int] = []
    for back, (left, right) in enumerate(reversed(sides), 1):
        if left == 0 == right:
            added += [0, 0]
            continue
        size = x.shape[-back]
        start, end = min(size, max(0, -left)), max(0, size - max(0, -right))
        x = x.narrow(-back, start, max(0, end - start))
        added += [max(0, left - max(0, -right - size)), max(0, right - max(0, -left - size))]
    return functional.pad(x, added) if any(added) else x


def _source_positions(x: Tensor, dim: int, sides: tuple[int, int], mode: str) -> Tensor:
    """Return the input position of every padded position, of shape ``[left + i + right]``."""
    size, (left, right) = x.shape[dim], sides
    largest = {"reflect": size - 1, "circular": size}.get(mode)
    if largest is not None and max(sides) > largest:
        raise ValueError(
            f"`padding` must be at most {largest} for mode {mode!r} and an input of size "
            f"{size}, got {sides}."
        )
    positions = torch.arange(-left, size + right, device=x.device)
    if mode == "circular":
        return positions % size
    if mode == "reflect":
        positions = positions.abs()
        return (size - 1) - ((size - 1) - positions).abs()
    return positions.clamp(0, size - 1)

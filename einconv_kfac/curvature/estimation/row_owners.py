"""Whether the rows of calls belong to the examples that their layouts give them to.

Gradients are linear in the vectors at the outputs. If the vector of each example is multiplied by
a power of two of its own, the gradient in a row of that example alone is multiplied by the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.example_layout import ExampleLayout
from einconv_kfac.curvature.estimation.random_vectors import random_vectors

_DIGITS = 16
"""Number of powers of two; the numbers of examples have digits in this base."""
_ROUNDING = 16.0
"""Largest error of a gradient, in units of the largest gradient's rounding."""
_RELATIVE = 0.1
"""Largest relative error; powers of two that differ are further apart."""
Check: TypeAlias = "tuple[Tensor, Tensor | None, Tensor | None]"
"""Powers of two by example, and gradients at a call for vectors, and for those times the powers."""


def multiplied(
    outputs: Sequence[Tensor], examples: int
) -> tuple[list[Tensor], list[tuple[Tensor, list[Tensor]]]]:
    """Return random vectors at the outputs, and powers of two with the vectors times these.

    Args:
        outputs: Tensors like the outputs of the model, ``[n, ...]``.
        examples: The number of examples.
    """
    vectors = [v if v.ndim else torch.zeros_like(v) for v in random_vectors(outputs)]
    if not vectors:
        return [], []
    count = max([examples, *(len(v) for v in vectors if v.ndim)])
    scaled = [
        (powers[:examples], [_times(vector, powers) for vector in vectors])
        for powers in _powers(count, vectors[0].device)
    ]
    return vectors, scaled


def _powers(examples: int, device: torch.device) -> Iterator[Tensor]:
    """Yield a power of two for each example; any two examples have different ones in one of them.

    Args:
        examples: The number of examples.
        device: Where the powers lie.
    """
    numbers, place = torch.arange(examples, device=device), 1
    while place < examples:
        yield 2.0 ** ((numbers // place) % _DIGITS - _DIGITS // 2)
        place *= _DIGITS


def is_other(layout: ExampleLayout, first: Tensor, second: Tensor, powers: Tensor) -> Tensor:
    """Return whether rows belong to other examples than a layout gives them to, as one boolean.

    Args:
        layout: The layout.
        first: The gradient at a call.
        second: The gradient at it for the vectors that are multiplied by powers.
        powers: The powers, ``[n]``.
    """
    return _compared(layout, first, second, powers)[2].any()


def belong_to_others(layout: ExampleLayout, checks: Sequence[Check]) -> Tensor:
    """Return whether rows belong to one example each, but not to that of a layout, as one boolean.

    Most entries that differ from what the layout says are then multiplied by the power of another
    example. Hardly any are, where examples share rows.

    Args:
        layout: The layout.
        checks: The gradients at a call.
    """
    excess = torch.zeros((), device=checks[0][0].device)
    for powers, first, second in checks:
        if first is not None and second is not None:
            rows, found, differs = _compared(layout, first, second, powers)
            quotient = (found / rows).abs()
            nearest = quotient.log2().round().exp2()
            error = (quotient - nearest).abs()
            is_power = error <= _ROUNDING * torch.finfo(rows.dtype).eps * nearest
            excess += (2 * (differs & is_power).sum() - differs.sum()).to(excess)
    return excess > 0


def _compared(
    layout: ExampleLayout, first: Tensor, second: Tensor, powers: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the two gradients by example, and where they differ from what the layout says."""
    rows, found = (layout.by_example(g.detach(), len(powers)) for g in (first, second))
    if not rows.numel():
        return rows, found, torch.zeros_like(rows, dtype=torch.bool)
    expected = _times(rows, powers)
    least = expected.abs().amax() * (_ROUNDING * torch.finfo(rows.dtype).eps)
    error = (found - expected).abs()
    return rows, found, error > _RELATIVE * (found.abs() + expected.abs()) + least


def _times(tensor: Tensor, powers: Tensor) -> Tensor:
    """Return a tensor ``[n, ...]`` times a number for each example."""
    if not tensor.ndim:
        return tensor
    own = powers[: len(tensor)].to(tensor)
    return tensor * own.reshape(-1, *[1] * (tensor.ndim - 1))

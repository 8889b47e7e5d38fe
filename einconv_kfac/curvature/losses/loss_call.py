"""The reduction of a loss, and its value for several targets."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Targets(tuple[Any, ...]):
    """Several targets of one loss, as in ``loss_fn(output, target, variance)``."""

    __slots__ = ()


def is_sum(loss: object) -> bool:
    """Return whether a loss is a sum over examples; others are taken for means."""
    return getattr(loss, "reduction", "mean") == "sum"


def check_reduction(loss: object) -> str:
    """Return ``"mean"`` or ``"sum"``; a loss without a ``reduction`` is taken for a mean.

    Raises:
        ValueError: If the loss has another reduction.
    """
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"`loss_fn.reduction` must be 'mean' or 'sum', got {reduction!r}.")
    return str(reduction)


def targets_of(target: Any) -> tuple[Any, ...]:
    """Return the arguments of a loss after the output; a tuple holds several of them."""
    return target if isinstance(target, tuple) else (target,)


def evaluate_loss(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    """Return the loss; a tuple of targets (a value and its variance) is passed as arguments."""
    value: Tensor = loss(output, *targets_of(target))
    return value

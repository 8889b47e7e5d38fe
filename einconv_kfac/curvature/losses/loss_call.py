"""The reduction of a loss, its targets, and its value for several targets."""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn


class Targets(tuple[Any, ...]):
    """Several targets of one loss, as in ``loss_fn(output, target, variance)``."""

    __slots__ = ()


def is_sum(loss: object) -> bool:
    """Return whether a loss is a sum over examples; others are taken for means."""
    return getattr(loss, "reduction", "mean") == "sum"


def check_reduction(loss: object) -> str:
    """Return ``"mean"`` or ``"sum"``; a loss without a ``reduction`` is taken for a mean.

    The reduction ``"batchmean"``, a sum divided by the number of examples, is a mean as well.

    Raises:
        ValueError: If the loss has another reduction.
    """
    reduction = getattr(loss, "reduction", "mean")
    if reduction == "batchmean":
        return "mean"
    if reduction not in {"mean", "sum"}:
        raise ValueError(
            f"`loss_fn.reduction` must be 'mean' or 'sum', got {reduction!r}. Pass such a loss, or "
            "in place of the module a function of output and target that returns one number."
        )
    return str(reduction)


def targets_of(target: Any) -> tuple[Any, ...]:
    """Return the arguments of a loss after the output; a tuple holds several of them."""
    return target if isinstance(target, tuple) else (target,)


def constant_targets(target: Any) -> tuple[Any, ...]:
    """Return the arguments of a loss after the output, as constants.

    Raises:
        ValueError: If one of them depends on parameters, since the curvature of the loss then
            has parts that do not pass through the output.
    """
    targets = targets_of(target)
    if depends_on_parameters(targets):
        raise ValueError(
            "The targets of `loss_fn` must not depend on parameters, got one that does, such as a "
            "predicted variance. Pass fisher='empirical', or detach the target if it is not "
            "trained."
        )
    return tuple(t.detach() if isinstance(t, Tensor) else t for t in targets)


def depends_on_parameters(targets: tuple[Any, ...]) -> bool:
    """Return whether a target was computed from parameters, or is one."""
    tensors = [t for t in targets if isinstance(t, Tensor) and t.requires_grad]
    return any(isinstance(leaf, nn.Parameter) for tensor in tensors for leaf in _leaves(tensor))


def _leaves(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the leaves of a tensor's autograd graph."""
    if tensor.grad_fn is None:
        yield tensor
        return
    waiting: list[Any] = [tensor.grad_fn]
    seen = {tensor.grad_fn}
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        new = {after for after, _ in node.next_functions if after is not None} - seen
        seen |= new
        waiting += new


def evaluate_loss(loss: nn.Module, output: Tensor, target: Any) -> Tensor:
    """Return the loss; a tuple of targets (a value and its variance) is passed as arguments."""
    value: Tensor = loss(output, *targets_of(target))
    return value


def unreduced(loss: nn.Module) -> nn.Module:
    """Return a copy of a loss that returns its entries, with ``reduction="none"``.

    Raises:
        ValueError: If the loss has no ``reduction``.
    """
    if not hasattr(loss, "reduction"):
        raise ValueError(
            "`loss_fn` must have a `reduction` if its entries are weighted, got "
            f"{type(loss).__name__} without one."
        )
    result = copy(loss)
    result.reduction = "none"  # type: ignore[assignment]
    return result


def in_precision(loss: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a loss whose buffers, such as class weights, have a floating-point type.

    Torch's losses take weights of the output's type. It is the loss itself if they have it.
    """
    other = {
        name: buffer.to(dtype)
        for name, buffer in loss._buffers.items()
        if buffer is not None and buffer.is_floating_point() and buffer.dtype != dtype
    }
    if not other:
        return loss
    result = copy(loss)
    result.__dict__["_buffers"] = {**loss._buffers, **other}
    return result


def targets_in_precision(targets: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Return targets whose floating-point tensors have at least a type."""
    return tuple(
        t.to(torch.promote_types(t.dtype, dtype))
        if isinstance(t, Tensor) and t.is_floating_point()
        else t
        for t in targets
    )


def weighted_entries(
    loss: nn.Module, values: Tensor, divisor: Tensor | int, weights: Tensor | None
) -> Tensor:
    """Multiply the curvature of each entry of a loss by its weight in the objective.

    Args:
        loss: The loss.
        values: The curvature of each entry of the unreduced loss, ``[*l]``.
        divisor: What the mean divides the sum of the entries by; for zero the result is zero.
        weights: The derivative of the objective with respect to each entry of the unreduced
            loss, ``[*l]``, or ``None`` for the reduction of the loss.
    """
    if weights is not None:
        return values * checked_weights(weights, values)
    if check_reduction(loss) == "sum":
        return values
    if isinstance(divisor, Tensor):
        return values / divisor.where(divisor != 0, 1)
    return values / max(divisor, 1)


def checked_weights(weights: Tensor, entries: Tensor) -> Tensor:
    """Return the weights of the entries of an unreduced loss, in their data type.

    Raises:
        ValueError: If they have another shape, or one is negative.
    """
    if weights.shape != entries.shape:
        raise ValueError(
            "`weights` must have the shape of the unreduced loss, "
            f"{tuple(entries.shape)}, got {tuple(weights.shape)}."
        )
    check_not_negative("`weights`", weights)
    return weights.detach().to(entries)


def check_not_negative(name: str, values: Tensor) -> None:
    """Raise a ``ValueError`` if a weight is negative."""
    if bool((values < 0).any()):
        raise ValueError(
            f"{name} must not be negative, since the curvature would be, got "
            f"{float(values.min()):.4g}. fisher='empirical' takes any loss."
        )


def check_batch(output: Tensor, target: Any) -> None:
    """Check that the output is a batch and that its target is not broadcast."""
    if output.ndim == 0:
        raise ValueError(
            f"The model's output must be a non-empty batch [n, *f], got {tuple(output.shape)}. Add "
            "a batch dimension with `x.unsqueeze(0)`."
        )
    if isinstance(target, Tensor) and target.shape != output.shape:
        raise ValueError(
            f"The target must have the output's shape {tuple(output.shape)}, got "
            f"{tuple(target.shape)}."
        )


def precise_type(output: Tensor) -> torch.dtype:
    """Return the type in which the curvature at an output is computed, at least float32."""
    return torch.promote_types(output.dtype, torch.float32)

"""Samples of loss rules, drawn for many copies of a batch at once."""

from __future__ import annotations

from typing import Any

from torch import Generator, Tensor, nn

COPIES, CALLS = 100, 100
DRAWS = COPIES * CALLS
"""Samples of each example."""


def copies(value: Any) -> Any:
    """Repeat the examples of a tensor, or of each tensor in a tuple."""
    if isinstance(value, tuple):
        return tuple(map(copies, value))
    return value.repeat(COPIES, *[1] * (value.ndim - 1))


def sampled_moment(
    rule: Any, loss: nn.Module, output: Tensor, target: Any, generator: Generator, **weights: Tensor
) -> Tensor:
    """Return the second moment of samples of a batch, ``[f, f]`` for a flattened output.

    The examples of a sample are independent, so that a batch of copies has as many samples of the
    batch. A mean divides by as many more terms. Products of different examples vanish on average.
    """
    outputs, targets = copies(output), copies(target)
    given = {name: copies(value) for name, value in weights.items()}
    total = output.new_zeros(output.numel(), output.numel())
    for _ in range(CALLS):
        sample = rule.sample(loss, outputs, targets, generator, **given)
        rows = sample.reshape(COPIES, -1)
        total += rows.T @ rows
    is_mean = getattr(loss, "reduction", "none") == "mean"
    return total / (CALLS if is_mean else DRAWS)

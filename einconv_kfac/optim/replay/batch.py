"""A recorded batch: one backpropagated loss and the forward pass behind it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Generator, Tensor

from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.subsample import Subset, random_rows


@dataclass(frozen=True)
class Batch:
    """One backpropagated loss.

    Args:
        forward: The forward pass that gave the loss its argument, or ``None`` if no output of
            the model is that argument.
        output: First argument of the loss, ``[n, ...]``, detached.
        target: Second argument of the loss, or all `Targets`.
        loss: The loss, detached.
        weight: The derivative of the objective with respect to this loss.
        subset: The examples that its curvature is computed from, if not all.
    """

    forward: ForwardPass | None
    output: Tensor
    target: Any
    loss: Tensor
    weight: Tensor
    subset: Subset | None = None

    @cached_property
    def curvature_forward(self) -> ForwardPass:
        """The forward pass that the curvature is computed from, that of the subset.

        Raises:
            RuntimeError: If the forward pass cannot be restricted to the subset.
        """
        assert self.forward is not None
        return self.forward.restricted(self.subset)

    @property
    def curvature_output(self) -> Tensor:
        """First argument of the loss for these examples, ``[k, ...]``."""
        return self.output if self.subset is None else self.output[self.subset.rows]


def with_subsets(batches: list[Batch], part: float, seed: int, step: int) -> list[Batch]:
    """Give each batch a random subset of its examples.

    Args:
        batches: The batches of a step.
        part: Fraction of the examples, rounded up; if it is 1, nothing is drawn.
        seed: Seed of the subsets, which depend on it and on the step alone.
        step: The number of the step.
    """
    if part == 1:
        return batches
    generator = Generator().manual_seed(seed * 1_000_003 + step)
    return [replace(batch, subset=_drawn(batch.output, part, generator)) for batch in batches]


def _drawn(output: Tensor, part: float, generator: Generator) -> Subset:
    """Return a random subset of the examples of an output ``[n, ...]``."""
    size = output.shape[0] if output.ndim else 1
    return Subset(random_rows(size, part, generator).to(output.device), size)

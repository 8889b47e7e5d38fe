"""A recorded batch: one backpropagated loss and the forward passes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Generator, Tensor

from einconv_kfac.curvature.devices.sending import sent
from einconv_kfac.curvature.objective.loss_model import LossModel
from einconv_kfac.distributed.random_streams import stream
from einconv_kfac.distributed.workers import ALONE, Workers
from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.subsample import Subset, random_rows
from einconv_kfac.optim.replay.versions import Versions


@dataclass(frozen=True)
class Batch:
    """One backpropagated loss.

    Args:
        forwards: The forward passes that it depends on.
        outputs: The tensors of these passes that it depends on, ``[n, ...]`` each, detached.
        parameters: Names of the parameters that the loss uses itself.
        loss_model: The loss as a function of these outputs, and of these parameters after them;
            ``None`` if it was not understood, or is not replayed.
        loss: The loss, detached.
        weight: The derivative of the objective with respect to this loss.
        versions: The versions of the targets.
        written: The versions of the outputs, which a script may change in place.
        refusal: Why the batch cannot be replayed, or ``None``.
        subset: The examples that its curvature is computed from, if not all.
        has_moved: Whether parameters were changed after the passes, and outputs and loss are those
            of the present ones.
        layers: Names of the layers whose factors it contributed to.
        is_assumed: Whether it was taken for a loss since the model returned it.
    """

    forwards: tuple[ForwardPass, ...]
    outputs: tuple[Tensor, ...]
    parameters: tuple[str, ...]
    loss_model: LossModel | None
    loss: Tensor
    weight: Tensor
    versions: Versions = field(default_factory=lambda: Versions(()))
    written: Versions = field(default_factory=lambda: Versions(()))
    refusal: str | None = None
    subset: Subset | None = None
    has_moved: bool = False
    layers: frozenset[str] = frozenset()
    is_assumed: bool = False

    def curvature_forwards(self) -> list[ForwardPass]:
        """Return the forward passes that the curvature is computed from, those of the subset.

        Raises:
            RuntimeError: If a forward pass cannot be restricted to the subset.
        """
        return [forward.restricted(self.subset) for forward in self.forwards]

    def curvature_outputs(self) -> list[Tensor]:
        """Return the outputs for these examples, ``[k, ...]`` each."""
        if self.subset is None:
            return list(self.outputs)
        return [output[self.subset.rows] for output in self.outputs]

    def precision(self, outputs: Sequence[Tensor]) -> float:
        """Return the largest machine epsilon of computations with these outputs or tangents."""
        environments = [each.call.environment for each in self.forwards for _ in each.inputs]
        eps = (own.precision(output.dtype) for own, output in zip(environments, outputs))
        return max(eps, default=0.0)


def with_subsets(
    batches: Sequence[Batch], part: float, seed: int, step: int, workers: Workers = ALONE
) -> list[Batch]:
    """Give each batch a random subset of its examples.

    Args:
        batches: The batches of a step.
        part: Fraction of the examples, rounded up; if it is 1, nothing is drawn.
        seed: Seed of the subsets.
        step: The number of the step.
        workers: The workers, each with batches of its own.
    """
    if part == 1:
        return list(batches)
    streams = [
        stream("cpu", "curvature", seed, step, workers.number(index))
        for index in range(len(batches))
    ]
    return [
        replace(batch, subset=_drawn(batch.outputs[0], part, own)) if batch.outputs else batch
        for batch, own in zip(batches, streams)
    ]


def _drawn(output: Tensor, part: float, generator: Generator) -> Subset:
    """Return a random subset of the examples of an output ``[n, ...]``."""
    size = output.shape[0] if output.ndim else 1
    return Subset(sent(random_rows(size, part, generator), output.device), size)

"""One step from the gradients at hand: the objective is put together, checked and stepped on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.optim.factors.curvature import NOT_FINITE, RunningCurvature
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.replay.batch import Batch, with_subsets
from einconv_kfac.optim.step.fallback import Fallback
from einconv_kfac.optim.step.objective import Point, memory_of, without_scaler
from einconv_kfac.optim.step.optimizer_state import restored_on_error
from einconv_kfac.optim.step.step_protocol import Step, Taken
from einconv_kfac.optim.vectors import Direction, norms


@dataclass(frozen=True)
class StepRunner:
    """Runs the steps of an optimizer.

    Args:
        curvature: Running curvature of the model.
        step: The kind of step.
        fallback: How parameters without factors are trained.
        settings: Hyper-parameters.
        names: Names of the model's parameters.
        reduction: That of the loss, ``"mean"`` or ``"sum"``.
    """

    curvature: RunningCurvature
    step: Step
    fallback: Fallback
    settings: Hyperparameters
    names: Mapping[nn.Parameter, str]
    reduction: str

    def run_(self, optimizer: Optimizer) -> tuple[Taken, Direction] | None:
        """Take a step, and return it with the norms of gradients; ``None`` if it was skipped.

        Raises:
            RuntimeError: See `KFAC.step`.
        """
        curvature = self.curvature
        scale = getattr(optimizer, "grad_scale", None)  # set by torch.amp.GradScaler for a step
        settings = self.settings.at(curvature.steps)
        point = Point.of(optimizer.param_groups, self.names, settings, scale)
        try:
            return self._run_(optimizer, point, settings, scale)
        except BaseException:
            curvature.discard_()
            raise

    def _run_(
        self, optimizer: Optimizer, point: Point, settings: Hyperparameters, scale: Tensor | None
    ) -> tuple[Taken, Direction] | None:
        """Take a step from a point, or skip it."""
        curvature = self.curvature
        batches = self._batches(optimizer, scale)
        gradients = [*point.gradient.values()]
        known = norms(gradients)
        if getattr(optimizer, "found_inf", None):  # the scaler will lower its scale
            curvature.discard_()
            return None
        if not curvature.is_finite(gradients, [batch.loss for batch in batches], known):
            curvature.discard_()
            warnings.warn(NOT_FINITE, RuntimeWarning, stacklevel=6)
            return None
        if not batches and not curvature.collector.moments and not any(point.rates.values()):
            curvature.discard_()  # as where torch.distributed.checkpoint asks for empty states
            return None
        with restored_on_error(optimizer, curvature, self.step, point.parameters):
            taken = self._take_(optimizer, point, batches, settings)
            curvature.finish_()
        return taken, dict(zip(point.gradient, known))

    def _batches(self, optimizer: Optimizer, scale: Tensor | None) -> list[Batch]:
        """Return the batches of this step, without a gradient scaler's factor."""
        batches = self.curvature.recorder.take()
        if hasattr(optimizer, "found_inf"):
            batches = without_scaler(batches, scale, self.reduction)
        if self.settings.maximize:
            batches = [replace(batch, weight=-batch.weight) for batch in batches]
        if (part := self.settings.curvature_fraction) == 1:
            return batches
        return with_subsets(batches, part, self.curvature.seed, self.curvature.steps)

    def _take_(
        self,
        optimizer: Optimizer,
        point: Point,
        batches: Sequence[Batch],
        settings: Hyperparameters,
    ) -> Taken:
        """Take a step from a point."""
        curvature = self.curvature
        curvature.set_groups_(settings, point.by_parameter)
        plain = curvature.without_factors(point.gradient)
        memory = memory_of(point.parameters, optimizer.state)
        others, moments = self.fallback.directions(plain, memory)
        objective = point.objective(settings, batches, others, memory)
        self.step.check(objective)
        curvature.collector.check(batches)
        if not point.parameters:
            return Taken({})
        taken = self.step.take_(objective)
        for name, state in moments.items():
            memory[name].update(state)
        return taken

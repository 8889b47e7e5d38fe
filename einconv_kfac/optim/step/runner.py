"""One step from the gradients at hand: the objective is put together, checked and stepped on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from torch import Tensor, nn
from torch.optim import Optimizer

from einconv_kfac.curvature.devices.stream_capture import is_capturing
from einconv_kfac.distributed.workers import Same
from einconv_kfac.optim.factors.batch_shares import Number
from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.finiteness import KNOWN, NOT_FINITE, Finiteness, NotFiniteError
from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.replay.batch import Batch, with_subsets
from einconv_kfac.optim.replay.environment import without_autocast
from einconv_kfac.optim.step.capturable import check_begun
from einconv_kfac.optim.step.fallback import Fallback
from einconv_kfac.optim.step.gradient_scaler import scaler_factor
from einconv_kfac.optim.step.group_settings import SettingsByParameter
from einconv_kfac.optim.step.held_norms import HeldNorms
from einconv_kfac.optim.step.late_check import LateCheck, restore_memory_
from einconv_kfac.optim.step.objective import Objective, Point, memory_of, on_gpu
from einconv_kfac.optim.step.parameter_change import ParameterChange
from einconv_kfac.optim.step.states.optimizer_state import restored_on_error
from einconv_kfac.optim.step.step_protocol import Step, Taken
from einconv_kfac.optim.vectors import Direction, norms

Found: TypeAlias = tuple[Taken, Direction, Direction]
"""A step, norms of gradients, and of parameters where they are divided, by name."""


@dataclass(frozen=True)
class StepRunner:
    """Runs the steps of an optimizer.

    Args:
        curvature: Running curvature of the model.
        step: The kind of step.
        fallback: How parameters without factors are trained.
        settings: Hyper-parameters.
        names: Names of the model's parameters.
        sums: Whether the loss is a sum over examples, not a mean.
        late: The check of the last step; it is settled before another step is run.

    Attributes:
        by_parameter: Hyper-parameters of each parameter's group.
    """

    curvature: RunningCurvature
    step: Step
    fallback: Fallback
    settings: Hyperparameters
    names: Mapping[nn.Parameter, str]
    sums: bool
    late: LateCheck = field(default_factory=LateCheck)
    by_parameter: SettingsByParameter = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_parameter", SettingsByParameter(self.names))

    def run_(self, optimizer: Optimizer) -> Found | None:
        """Take a step, and return it with norms of gradients; ``None`` if it was skipped.

        Raises:
            RuntimeError: See `KFAC.step`.
        """
        curvature, steps = self.curvature, self.curvature.steps
        settings = self.settings.at(steps)
        by_parameter = self.by_parameter.of(optimizer.param_groups, settings)
        try:
            with curvature.stored.gathered(curvature.workers):
                return self._run_(optimizer, settings, by_parameter)
        except BaseException:
            if curvature.steps == steps:  # it was not taken
                self.late.drop_()
            curvature.discard_()
            raise

    def _run_(
        self,
        optimizer: Optimizer,
        settings: Hyperparameters,
        by_parameter: Mapping[str, Hyperparameters],
    ) -> Found | None:
        """Take a step from the gradients at hand, or skip it."""
        curvature = self.curvature
        batches, divisor, scaler = self._batches(optimizer)
        point = Point.of(
            optimizer.param_groups, self.names, by_parameter, divisor, curvature.stored
        )
        known = norms(point.gradient.values())
        if self._found_inf(optimizer):  # the scaler will lower its scale
            curvature.discard_()
            return None
        undone = restored_on_error(optimizer, curvature, self.step, point.parameters)
        try:
            finite = self._finiteness(point, known, batches)
            if not batches and not curvature.collector.moments and not any(point.rates.values()):
                finite.require_()
                curvature.discard_()  # as where torch.distributed.checkpoint asks for empty states
                return None
            with undone as last, without_autocast(curvature.model):
                with finite.before_errors():
                    taken = self._take_(optimizer, point, batches, settings, finite, scaler)
                curvature.discard_() if self._is_captured else curvature.finish_()
                if finite.is_late and not self.settings.capturable:
                    self.late.begin_(finite)
                last.apply_([*taken.changes, *self._stored(point.parameters)])
        except NotFiniteError as error:
            self._skipped_(str(error))
            return None
        return self._report(taken, point, known)

    def _skipped_(self, fault: str) -> None:
        """Report that the step is skipped, for a number that is not finite."""
        self.curvature.discard_()
        warnings.warn(NOT_FINITE.format(fault), RuntimeWarning, stacklevel=7)

    def _finiteness(
        self, point: Point, known: Sequence[Tensor], batches: Sequence[Batch]
    ) -> Finiteness:
        """Return whether all numbers are finite; several workers find out together, and at once.

        Raises:
            NotFiniteError: If several workers have a number that is not finite.
        """
        collector, losses = self.curvature.collector, [batch.loss for batch in batches]
        if self.curvature.workers.size == 1:
            return collector.finiteness(point.gradient, losses, known)
        same = partial(self._same, point, known)
        if fault := collector.not_finite(point.gradient, losses, known, same):
            raise NotFiniteError(fault)
        return KNOWN

    def _found_inf(self, optimizer: Optimizer) -> bool:
        """Return whether a gradient scaler has found a gradient that is not finite."""
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        return found is not None and not self.curvature.workers.agree(
            found == 0, "has the scaler found finite gradients"
        )

    def _same(self, point: Point, known: Sequence[Tensor]) -> Same:
        """Return what must be the same on all workers."""
        groups = {id(own): own for own in point.by_parameter.values()}.values()
        values = {
            **{f"`{n}` of group {i}": v for i, g in enumerate(groups) for n, v in vars(g).items()},
            "parameters with a gradient": list(point.parameters),
            "layers whose factors are due": sorted(self.curvature.collector.due),
            "number of steps": self.curvature.steps,
        }
        compared = {"gradients": known}
        if self.curvature.collector.due:
            compared["parameters"] = norms(point.parameters.values())
        return Same(values, compared)

    def _batches(self, optimizer: Optimizer) -> tuple[list[Batch], Tensor | None, Number]:
        """Return the batches of this step, and the factor in the gradients that is none of theirs.

        The factor comes from a gradient scaler and, if steps are automatic, from clipping. The
        factor of the scaler that the batches' weights were divided by is returned as well.
        """
        scale = getattr(optimizer, "grad_scale", None)  # set by torch.amp.GradScaler for a step
        recorder = self.curvature.recorder
        clipped = None
        if self.settings.adaptive:
            clipped = recorder.gradients.factor(self.curvature.workers)
        elif not self._is_captured:
            recorder.gradients.check()
        batches = recorder.take()
        divisor: Tensor | None = scale
        factor: Number = 1.0
        is_scaled = hasattr(optimizer, "found_inf")
        if is_scaled and (batches or self.curvature.workers.size > 1):  # others may have batches
            own = scaler_factor(batches, scale, self.sums, self.curvature.workers)
            batches, factor = [replace(b, weight=b.weight / own.to(b.weight)) for b in batches], own
            clipped = None if clipped is None else clipped * (1 if scale is not None else factor)
        if clipped is not None and batches:
            divisor = clipped if divisor is None else divisor * clipped
        if (part := self.settings.curvature_fraction) == 1:
            return batches, divisor, factor
        seed, workers = self.curvature.seed, self.curvature.workers
        return with_subsets(batches, part, seed, self.curvature.steps, workers), divisor, factor

    def _take_(
        self,
        optimizer: Optimizer,
        point: Point,
        batches: Sequence[Batch],
        settings: Hyperparameters,
        finite: Finiteness,
        scaler: Number,
    ) -> Taken:
        """Take a step from a point."""
        curvature = self.curvature
        curvature.set_groups_(settings, point.by_parameter)
        if curvature.collector.due:
            curvature.collector.combine_(batches, scaler)
        plain = curvature.without_factors(point.gradient)
        memory = memory_of(point.parameters, optimizer.state, curvature.stored)
        others, moments = self.fallback.directions(plain, memory)
        own = settings, batches, others, memory, curvature.workers, finite
        objective = point.objective(*own)
        self.step.check(objective)
        curvature.collector.check(batches)
        if not point.parameters:
            finite.require_()
            return Taken({})
        if self._may_be_late(optimizer, objective):
            finite.be_late_()
        if self._is_captured:
            check_begun(objective, moments)
        before = {name: dict(own) for name, own in memory.items() if finite.is_late}
        has_norms = any(own.layer.computed is not None for own in curvature.layers.values())
        held = HeldNorms.of(curvature.layers, point.parameters) if has_norms else None
        taken = self.step.take_(objective)
        if held is not None and self.step.moves_parameters:
            held.restore_(point.parameters, memory)
        kept = self.fallback.keep_(memory, moments, finite)
        if finite.is_late and not self.settings.capturable:
            undo_ = restore_memory_(memory, before, finite)
            self.late.prepare_(undo_, self._take_back_)
        curvature.stored.keep_(optimizer.state, point.parameters, memory)
        return replace(taken, changes=[*taken.changes, *kept])

    @property
    def _is_captured(self) -> bool:
        """Whether a CUDA graph is capturing the step."""
        return self.settings.capturable and is_capturing()

    def _stored(self, parameters: Direction) -> list[ParameterChange]:
        """Return the change of what is stored of parameters where that is not all of them."""
        rows, parts = self.curvature.stored.rows(parameters.values())
        return [ParameterChange.replacing(rows, parts)] if rows else []

    def _report(self, taken: Taken, point: Point, known: Sequence[Tensor]) -> Found:
        """Return a step without tensors that are whole where parameters are divided."""
        gradients = dict(zip(point.gradient, known))
        if not self.curvature.stored.is_divided:
            return replace(taken, changes=()), gradients, {}
        updates = zip(taken.moved.items(), norms(own for own, _ in taken.moved.values()))
        moved = {name: (norm, factor) for (name, (_, factor)), norm in updates}
        present = dict(zip(point.parameters, norms(point.parameters.values())))
        return replace(taken, changes=(), moved=moved), gradients, present

    def _take_back_(self) -> None:
        """Take back the count of a step that neither updated nor inverted factors."""
        self.curvature.steps -= 1
        self.curvature.collector.drop_due_()

    def _may_be_late(self, optimizer: Optimizer, objective: Objective) -> bool:
        """Return whether a step may be checked later: an ordinary one with fixed rates on a GPU."""
        if (
            self.step.moves_parameters
            or objective.finite.is_known
            or hasattr(optimizer, "found_inf")
            or self.curvature.stored.is_divided
        ):
            return False
        if not (self.settings.capturable or on_gpu(objective)):
            return False
        return self.curvature.is_ordinary

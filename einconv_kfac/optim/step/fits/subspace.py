"""The best step in the subspace of a few directions, by the quadratic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.preconditioning import by_scale
from einconv_kfac.optim.schedule import is_due
from einconv_kfac.optim.state_schema import COUNT, NUMBER, Maybe, Record
from einconv_kfac.optim.step.agreement import LARGEST_NOISE, Agreement
from einconv_kfac.optim.step.fits.carried_fit import CarriedFit, CarriedMix
from einconv_kfac.optim.step.fits.fit import Fit, Momentum
from einconv_kfac.optim.step.fits.pending_fit import PendingFit, SolvedFit
from einconv_kfac.optim.step.fits.quadratic_model import PendingModel, Products
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.momentum.layer_products import pending_products
from einconv_kfac.optim.step.objective import Objective, on_gpu
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.vectors import Direction

FIT_PERIOD = 10
"""Steps between two fits of the coefficients, which take a Jacobian-vector product for each
direction. The steps in between take the last coefficients (`CarriedFit`)."""
LARGEST_CHANGE = math.log(2)
"""Bound on the sum over layers of the relative changes of their outputs. Where each of many
layers in a row changes by ``c``, the network changes by up to ``prod(1 + c) - 1 <= 1`` (deep
relative trust; Bernstein et al., 2020), which no quadratic model accounts for. A larger change
can leave rectifiers without a gradient for good."""
GIVEN_CHANGE = 2 * LARGEST_CHANGE
"""The bound where the damping is given, which bounds most steps itself. After a step beyond the
other bound the objective is evaluated, and the step is shortened where it has grown."""
CERTAIN_FRACTION = 0.5
"""Fraction of that bound up to which the change of a step between two fits is taken to be
proportional to its length, with the last computed ratio; beyond it the change is computed."""
LIKELY_FRACTION = CERTAIN_FRACTION / 2
"""Fraction of that bound from which on a GPU computes the change of the next step in any case, as
the host would have to wait before it could ask for that."""


class SubspaceFit:
    """Fits the coefficients of directions.

    Args:
        curvature: Running curvature of the model, which replays the batches.
        trust: The trust in the slopes along descent directions.
        agreement: Whether batches agree.

    Attributes:
        fitted: The step that was fitted last; ``None`` where the next is to be fitted in any case.
        reach: Change of the layers' outputs per length of a step, when it was last computed.
        was_bounded: Whether the bound on that change shortened the last step of which it was
            computed.
    """

    def __init__(
        self, curvature: RunningCurvature, trust: SlopeTrust, agreement: Agreement
    ) -> None:
        self._curvature = curvature
        self._trust = trust
        self._agreement = agreement
        self._carried = CarriedFit()
        self.fitted: int | None = None
        self.reach = math.inf
        self._is_near = self._is_close = self.was_bounded = False

    def is_due(self, step: int) -> bool:
        """Return whether coefficients are to be fitted in a step."""
        return is_due(step, self.fitted, FIT_PERIOD)

    def drop_(self) -> None:
        """Fit anew in the next step, whose coefficients may have been too large in this one."""
        self.fitted = None

    def keep_(self, objective: Objective, fit: Fit, momentum: Momentum) -> Fit:
        """Keep the coefficients of a fit for the steps that follow, and return it.

        Those of a step with a given momentum are not kept: they make up for the momentum.
        """
        self.fitted = self._curvature.steps
        if momentum.coefficient is None:
            mix = fit.mix[: len(fit.mix) - bool(momentum.direction)]
            self._carried.keep_(objective, mix, fit.along.slope, fit.along.bend)
        return fit

    def mixed(
        self, objective: Objective, covered: Direction, followed: Direction
    ) -> CarriedMix | None:
        """Return the directions with the coefficients of the last fit; see `CarriedFit.mixed`.

        It takes no Jacobian-vector product.

        Args:
            objective: The objective.
            covered: The preconditioned gradient of the parameters that have factors.
            followed: The slow momentum, times learning rates.
        """
        ascents = [*by_scale(covered, self._curvature.apart), objective.others]
        ascents = [ascent for ascent in ascents if ascent]
        mix = self._carried.mixed(objective, *objective.descents(ascents), followed)
        if mix is None or not (self._is_near or (self._is_close and on_gpu(objective))):
            return mix
        return replace(mix, change=self._change(objective, mix.direction))

    def carried(
        self, objective: Objective, mix: CarriedMix, numbers: Sequence[float]
    ) -> Fit | None:
        """Return the step along a mix, or ``None`` if the coefficients do not hold.

        Far from the bound, the change of the layers' outputs is not computed but taken to be
        proportional to the length of the step.

        Args:
            objective: The objective.
            mix: The mix.
            numbers: Its `CarriedMix.numbers` on the host.
        """
        is_noisy = self._agreement.noise >= LARGEST_NOISE
        fit = self._carried.fit(mix, numbers, self._trust.fraction, is_noisy=is_noisy)
        if fit is None:
            return None
        share = self.reach * fit.length / _bound(objective)
        self._is_near, self._is_close = share > CERTAIN_FRACTION, share > LIKELY_FRACTION
        if not self._is_near:
            return fit
        change = self._change(objective, mix.direction) if mix.change is None else numbers[-1]
        return self._bounded(objective, fit, abs(fit.coefficients[0]) * float(change))

    def pending_factor(
        self, objective: Objective, mix: CarriedMix, trust: float | Tensor
    ) -> float | Tensor:
        """Return the step along a mix, as a multiple of the mix, before the host has read a number.

        It is that of `carried` where `is_as_expected` says so.

        Args:
            objective: The objective.
            mix: The mix.
            trust: The trust, which the host may not have read either.
        """
        factor = trust * self._carried.factor
        if mix.change is None or not mix.change.is_cuda:
            return factor
        return factor / (mix.change * factor / _bound(objective)).clamp_min(1)

    def is_as_expected(
        self, objective: Objective, mix: CarriedMix, numbers: Sequence[float], fit: Fit
    ) -> bool:
        """Return whether a step along a mix is that of `pending_factor`.

        Args:
            objective: The objective.
            mix: The mix.
            numbers: Its `CarriedMix.numbers` on the host.
            fit: The step of `carried`.
        """
        if mix.change is None:
            return not fit.is_bounded
        return fit.is_bounded or abs(fit.coefficients[0]) * numbers[-1] <= _bound(objective)

    def begun(
        self,
        objective: Objective,
        directions: Sequence[Direction],
        momentum: Momentum,
        products: Products,
    ) -> PendingFit:
        """Ask for the quadratic model of the best combination of directions and of the momentum.

        Args:
            objective: The objective.
            directions: The descent directions.
            momentum: The momentum.
            products: The Jacobian-vector products that are known.
        """
        spanned = self.spanned(objective, directions, momentum)
        model = PendingModel(objective, spanned, products)
        return PendingFit(objective, spanned, len(directions), momentum, products, model)

    def solved(self, pending: PendingFit, damping: float) -> SolvedFit:
        """Return the coefficients of a fit, once the host has read the model.

        Args:
            pending: The fit.
            damping: The damping of the quadratic model.
        """
        objective, momentum = pending.objective, pending.momentum
        model = pending.model(self._curvature.replay)
        trusted = self._trust.corrected(model, pending.descents)
        is_noisy = not self._agreement.is_close
        fit = pending.minimum(model, trusted, damping, is_noisy=is_noisy)
        if not math.isfinite(fit.expected):
            return SolvedFit(pending, fit)
        update = fit.update(objective)
        change = self._change(objective, update)
        if momentum.coefficient is not None:
            return SolvedFit(pending, fit, change, Unread(change))
        point = objective.parameters, objective.gradient
        products = pending_products(point, momentum.direction, update)
        return SolvedFit(pending, fit, change, Unread(change, products.numbers), products)

    def finished_(self, solved: SolvedFit) -> Fit:
        """Return a fit within the bound on the change of the layers' outputs, which the host reads.

        Args:
            solved: The fit.
        """
        begun, fit = solved.begun, solved.fit
        if solved.asked is None:
            return fit
        (change,), *found = solved.asked.read()
        if solved.products is not None:
            fit = replace(fit, products=solved.products.of(found[0]))
            if begun.momentum.direction and not begun.has_momentum:
                fit = fit.with_slow_momentum()
        return self._bounded(begun.objective, fit, change)

    def spanned(
        self, objective: Objective, directions: Sequence[Direction], momentum: Momentum
    ) -> list[Direction]:
        """Return what the subspace of a fit is spanned by: descent directions, and the momentum.

        Of a slow momentum, the trust alone needs the curvature, for which it is estimated where
        batches differ (`Fit.with_slow_momentum`): a sample then differs by more from batch to
        batch. With a given damping, nothing says whether they do.
        """
        if not momentum.direction:
            return list(directions)
        is_exact = self._agreement.is_close or objective.settings.damping is not None
        if is_exact or momentum.coefficient is not None:
            return [*directions, momentum.direction]
        return list(directions)

    def _change(self, objective: Objective, update: Direction) -> Tensor:
        """Return the change of the layers' outputs by a step."""
        return self._curvature.relative_change(update, objective.parameters)

    def _bounded(self, objective: Objective, fit: Fit, change: float) -> Fit:
        """Return a step, or the largest fraction within the bound on the layers' outputs.

        Args:
            objective: The objective.
            fit: The step.
            change: The change of the layers' outputs by it.
        """
        self.reach = change / length if (length := fit.length) else math.inf
        self._is_close = change > LIKELY_FRACTION * _bound(objective)
        self.was_bounded = change > _bound(objective)
        if change <= (bound := _bound(objective)):
            return fit
        if not math.isfinite(change):
            return replace(fit, along=replace(fit.along, trusted=math.nan))
        return replace(fit.scaled(bound / change), is_bounded=True)

    @staticmethod
    def bounded_factor(solved: SolvedFit) -> Tensor | None:
        """Return the fraction of a step within the bound, on the device; ``None`` if not finite."""
        bound, change = _bound(solved.begun.objective), solved.change
        return None if change is None else (bound / change).clamp_max(1)

    schema = Record({"carried": CarriedFit.schema, "fitted": Maybe(COUNT), "reach": NUMBER})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        carried = self._carried.state_dict()
        return {"carried": carried, "fitted": self.fitted, "reach": self.reach}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._carried.load_state_dict(state["carried"])
        self.fitted, self.reach = state["fitted"], state["reach"]


def _bound(objective: Objective) -> float:
    """Return the bound on the change of the layers' outputs."""
    return LARGEST_CHANGE if objective.settings.damping is None else GIVEN_CHANGE

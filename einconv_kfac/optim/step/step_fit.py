"""The step on a batch: which inverses precondition its gradient, and with which coefficients."""

from __future__ import annotations

from dataclasses import dataclass, replace

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.preconditioning import by_scale
from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.comparison.asking_ahead import AskingAhead
from einconv_kfac.optim.step.damping.search import DampingSearch, Trials
from einconv_kfac.optim.step.damping.trials import DampingTrials, StagedFit
from einconv_kfac.optim.step.fits.carried_fit import CarriedMix
from einconv_kfac.optim.step.fits.fit import Fit, Momentum
from einconv_kfac.optim.step.fits.pending_fit import PendingFit, SolvedFit
from einconv_kfac.optim.step.fits.quadratic_model import Products
from einconv_kfac.optim.step.fits.small_rates import SmallRates
from einconv_kfac.optim.step.fits.subspace import FIT_PERIOD, SubspaceFit
from einconv_kfac.optim.step.objective import Objective, is_late
from einconv_kfac.optim.vectors import Direction

LONGEST_WAIT = FIT_PERIOD // 2
"""Steps that a fit waits for an inversion, after which another fit would be due."""


@dataclass(frozen=True)
class BegunFit:
    """A fit whose numbers the device was asked for: of one damping, or of several.

    Args:
        pending: The fit, or ``None`` where dampings are tried.
        trials: The trials of dampings.
    """

    pending: PendingFit | None = None
    trials: Trials | None = None


class StepFit:
    """Fits steps.

    Args:
        curvature: Running curvature of the model.
        subspace: Fits the coefficients of directions.
        asking: Asks a GPU for steps before the host has read all numbers of a fit.
        agreement: Whether batches agree.

    Attributes:
        subspace: See above.
        search: Searches the damping of the inverses.
    """

    def __init__(
        self,
        curvature: RunningCurvature,
        subspace: SubspaceFit,
        asking: AskingAhead,
        agreement: Agreement,
    ) -> None:
        self._curvature, self._asking = curvature, asking
        self.subspace = subspace
        self.search = DampingSearch(agreement)
        self._small_rates = SmallRates()

    def is_due(self, step: int, *, is_given: bool) -> bool:
        """Return whether a step is to be fitted to its batch.

        Coefficients are those of directions by the same inverses, and do not hold for others. A fit
        that is due shortly before an inversion waits for that, and so does a search.

        Args:
            step: The step.
            is_given: Whether the damping is given, and not searched.
        """
        if self._curvature.inverts(step) or self.subspace.fitted is None:
            return True
        if not self.subspace.is_due(step) and (is_given or not self._searches(step)):
            return False
        return not any(self._curvature.inverts(step + wait) for wait in range(1, LONGEST_WAIT + 1))

    def mixed_(self, objective: Objective, momentum: Momentum, damping: float) -> CarriedMix | None:
        """Return the directions with the coefficients of the last fit; see `SubspaceFit.mixed`.

        No inverse is due.
        """
        self._curvature.set_damping_(damping * self.search.scale, objective.decay)
        covered = self._curvature.precondition(objective.gradient)
        return self.subspace.mixed(objective, covered, momentum.direction)

    def begun_(self, objective: Objective, momentum: Momentum, damping: float) -> BegunFit:
        """Ask the device for the numbers of a fit, or of the first trials of dampings.

        Inverses that are due are computed.
        """
        if self._tries(objective):
            trials = self._trials(objective, momentum, damping)
            trials.ask_(self.search.first(self._curvature.steps))
            return BegunFit(trials=trials)
        self._curvature.refresh_(damping * self.search.scale, objective.decay)
        products = Products(self._curvature.replay, objective)
        directions = self._directions(objective, None)
        return BegunFit(self.subspace.begun(objective, directions, momentum, products))

    def best_(
        self,
        objective: Objective,
        momentum: Momentum,
        damping: float,
        begun: BegunFit | None = None,
    ) -> Fit:
        """Return the best step, with up-to-date inverses.

        From time to time larger and smaller dampings of the inverses are tried as well, and
        the one that promises the largest reduction is kept. A given damping is used as given.

        Args:
            objective: The objective.
            momentum: The momentum.
            damping: The damping.
            begun: The fit, if the device was asked for its numbers.
        """
        self._small_rates.look_(objective.rates, self._curvature.steps)
        begun, search = begun or BegunFit(), self.search
        if begun.trials or (begun.pending is None and self._tries(objective)):
            trials = begun.trials or self._trials(objective, momentum, damping)
            best = search.best_(self._curvature.steps, trials)
            self._curvature.use_(best.inverses)
            return self.subspace.keep_(objective, best.fit, momentum)
        pending = begun.pending or self.begun_(objective, momentum, damping).pending
        assert pending is not None
        solved, ahead = self.subspace.solved(pending, damping), None
        if (factor := self.subspace.bounded_factor(solved)) is not None:
            ahead = self._asking.step(objective, solved.fit, self._curvature.steps, factor)
        found = replace(self.subspace.finished_(solved), ahead=ahead)
        return self.subspace.keep_(objective, found, momentum)

    def _tries(self, objective: Objective) -> bool:
        """Return whether dampings are tried in the coming step."""
        return objective.settings.damping is None and self._searches(self._curvature.steps)

    def _searches(self, step: int) -> bool:
        """Return whether a search of the damping is due."""
        return self.search.is_due(step) and self._curvature.inversions.may_search(step)

    def _trials(
        self, objective: Objective, momentum: Momentum, damping: float
    ) -> DampingTrials[PendingFit, SolvedFit]:
        """Return what tries scales of the damping."""
        self.search.is_costly = self._curvature.inversions.spacing > 1
        curvature, subspace = self._curvature, self.subspace
        products, invert = (
            Products(curvature.replay, objective),
            curvature.trial_inverses(objective.decay),
        )

        def begun(inverses: Inverses) -> PendingFit:
            directions = self._directions(objective, inverses)
            return subspace.begun(objective, directions, momentum, products)

        def solved(pending: PendingFit) -> SolvedFit:
            return subspace.solved(pending, damping)

        def ahead(fit: Fit) -> Fit:
            return self._asking.with_step(objective, fit, curvature.steps)

        fit = StagedFit(begun, solved, subspace.finished_, ahead)
        return DampingTrials(lambda scale: invert(damping * scale), fit, is_late(objective))

    def _directions(self, objective: Objective, inverses: Inverses | None) -> list[Direction]:
        """Return the descent directions, with given inverses or the present ones."""
        covered = self._curvature.precondition(objective.gradient, inverses)
        ascents = [*by_scale(covered, self._curvature.apart), objective.others]
        return [objective.descent(ascent) for ascent in ascents if ascent]

"""The step on a batch: which inverses precondition its gradient, and with which coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.carried_fit import CarriedMix
from einconv_kfac.optim.step.damping.search import DampingSearch
from einconv_kfac.optim.step.fit import Fit, Momentum
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.quadratic_model import PendingModel, Products
from einconv_kfac.optim.step.subspace import SubspaceFit, descent
from einconv_kfac.optim.vectors import Direction


@dataclass(frozen=True)
class BegunFit:
    """A fit whose numbers the device was asked for.

    Args:
        directions: The descent directions.
        products: The Jacobian-vector products, with the quadratic model of the fit.
    """

    directions: Sequence[Direction]
    products: Products


class StepFit:
    """Fits steps.

    Args:
        curvature: Running curvature of the model.
        subspace: Fits the coefficients of directions.
        agreement: Whether batches agree.

    Attributes:
        subspace: See above.
        search: Searches the damping of the inverses.
    """

    def __init__(
        self, curvature: RunningCurvature, subspace: SubspaceFit, agreement: Agreement
    ) -> None:
        self._curvature = curvature
        self._agreement = agreement
        self.subspace = subspace
        self.search = DampingSearch()

    def is_due(self, step: int, *, is_given: bool) -> bool:
        """Return whether a step is to be fitted to its batch.

        Coefficients are those of directions by the same inverses, and do not hold for others.

        Args:
            step: The step.
            is_given: Whether the damping is given, and not searched.
        """
        if self.subspace.is_due(step) or self._curvature.inverts(step):
            return True
        return not is_given and self._searches(step)

    def _searches(self, step: int) -> bool:
        """Return whether to search the damping of the inverses at a step."""
        return self.search.is_due(step, is_close=self._agreement.is_close)

    def mixed_(self, objective: Objective, momentum: Momentum, damping: float) -> CarriedMix | None:
        """Return the directions with the coefficients of the last fit; see `SubspaceFit.mixed`.

        No inverse is due.
        """
        self._curvature.set_damping_(damping * self.search.scale, objective.decay)
        covered = self._curvature.precondition(objective.gradient)
        return self.subspace.mixed(objective, covered, momentum.direction)

    def begun_(self, objective: Objective, momentum: Momentum, damping: float) -> BegunFit | None:
        """Ask the device for the numbers of a fit; ``None`` if dampings are to be tried.

        Inverses that are due are computed.
        """
        if objective.settings.damping is None and self._searches(self._curvature.steps):
            return None
        self._curvature.refresh_(damping * self.search.scale, objective.decay)
        products = Products(self._curvature.replay, objective)
        directions = self._directions(objective, None)
        spanned = self.subspace.spanned(objective, directions, momentum)
        products.pending = PendingModel(objective, spanned, products)
        return BegunFit(directions, products)

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
        curvature, search = self._curvature, self.search
        given = objective.settings.damping is not None
        if begun is not None:
            own = momentum, damping, begun.products
            found = self.subspace.full(objective, begun.directions, *own)
            return self.subspace.keep_(objective, found, momentum)
        products = Products(curvature.replay, objective)

        def fit(inverses: Inverses | None = None) -> Fit:
            directions = self._directions(objective, inverses)
            return self.subspace.full(objective, directions, momentum, damping, products)

        if given or not self._searches(curvature.steps):
            curvature.refresh_(damping * search.scale, objective.decay)
            return self.subspace.keep_(objective, fit(), momentum)
        invert = curvature.trial_inverses(objective.decay)
        best = search.best_(curvature.steps, lambda scale: invert(damping * scale), fit)
        curvature.use_(best.inverses)
        return self.subspace.keep_(objective, best.fit, momentum)

    def _directions(self, objective: Objective, inverses: Inverses | None) -> list[Direction]:
        """Return the descent directions, with given inverses or the present ones."""
        covered = self._curvature.precondition(objective.gradient, inverses)
        return [descent(objective, own) for own in (covered, objective.others) if own]

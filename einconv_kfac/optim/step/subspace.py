"""The best step in the subspace of a few directions, by the quadratic model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.optim.factors.curvature import RunningCurvature
from einconv_kfac.optim.schedule import is_due
from einconv_kfac.optim.state_schema import COUNT, NUMBER, Maybe, Record
from einconv_kfac.optim.step.carried_fit import CarriedFit
from einconv_kfac.optim.step.layer_products import LayerProducts, layer_products
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.quadratic_model import QuadraticModel, quadratic_model
from einconv_kfac.optim.step.slope_trust import SlopeTrust
from einconv_kfac.optim.vectors import Direction, combination, scaled

FIT_PERIOD = 10
"""Steps between two fits of the coefficients, which take a Jacobian-vector product for each
direction. The steps in between take the last coefficients (`CarriedFit`)."""
LARGEST_CHANGE = math.log(2)
"""Bound on the sum over layers of the relative changes of their outputs. Where each of many
layers in a row changes by ``c``, the network changes by up to ``prod(1 + c) - 1 <= 1`` (deep
relative trust; Bernstein et al., 2020), which no quadratic model accounts for. A larger change
can leave rectifiers without a gradient for good."""
CERTAIN_FRACTION = 0.5
"""Fraction of that bound up to which the change of a step between two fits is taken to be
proportional to its length, with the last computed ratio; beyond it the change is computed."""


@dataclass(frozen=True)
class Momentum:
    """The momentum as a direction of the subspace.

    Args:
        direction: The direction; empty in the first step.
        coefficient: Its coefficient in the step if that is given, or ``None`` for the slow
            momentum, which enters the quadratic model but not the step.
    """

    direction: Direction
    coefficient: float | None


@dataclass(frozen=True)
class Fit:
    """A step: a linear combination of directions.

    Args:
        directions: The directions.
        model: The quadratic model of the batch in their span.
        coefficients: The coefficients, ``[m]``.
        expected: The expected change of the objective, not only on the batch.
        mix: The coefficients of the preconditioned gradient, of the direction of parameters
            without factors if there is one, and of a momentum if there is one.
        products: For a step with the coefficients of an earlier fit, its inner products by layer.
            Otherwise the model is that of the batch.
    """

    directions: list[Direction]
    model: QuadraticModel
    coefficients: Tensor
    expected: float
    mix: tuple[float, ...]
    products: dict[str, LayerProducts] | None = None

    def update(self, objective: Objective, rate: float = 1.0) -> Direction:
        """Return the step times a rate, by parameter name."""
        coefficients = (self.coefficients * rate).tolist()
        return combination(objective.parameters, coefficients, self.directions)

    def predicted(self, damping: float, rate: float = 1.0) -> float:
        """Return the change of the damped objective on the batch that the model predicts."""
        return float(self.model.change(self.coefficients * rate, damping))

    @property
    def length(self) -> float:
        """Return the Euclidean norm of the step."""
        return math.sqrt(max(0.0, float(self.coefficients @ self.model.gram @ self.coefficients)))

    def scaled(self, factor: float, expected: float) -> Fit:
        """Return the step times a factor, with the change that is then expected."""
        mix = tuple(factor * c for c in self.mix)
        return replace(self, coefficients=self.coefficients * factor, expected=expected, mix=mix)

    @property
    def is_exact(self) -> bool:
        """Whether the model is that of the batch, with a coefficient for every direction."""
        return self.products is None

    def own_products(self, rate: float) -> dict[str, LayerProducts] | None:
        """Return the inner products of the step times a rate, by layer, if they are known."""
        if self.products is None:
            return None
        factor = rate * float(self.coefficients)
        return {layer: own.scaled(factor) for layer, own in self.products.items()}

    def moved(self, rate: float, last: float = 0.0) -> float:
        """Return ``d.(G + W).u`` for the first direction ``d``.

        Args:
            rate: Factor of the step in ``u``.
            last: Coefficient of the last direction, in addition.
        """
        curvature = self.model.curvature[0]
        return rate * float(curvature @ self.coefficients) + last * float(curvature[-1])

    @property
    def is_failure(self) -> bool:
        """Whether the model is not finite, or its step has no length though there is a slope.

        Directions whose squares underflow are none: the gradient is then as good as zero.
        """
        if not math.isfinite(self.expected):
            return True
        moves = (self.model.slope != 0) & (self.model.gram.diagonal() > 0)
        return not any(self.mix) and bool(moves[0])

    @property
    def rank(self) -> float:
        """Return the expected change, or infinity if that is not a number."""
        return math.inf if math.isnan(self.expected) else self.expected


class SubspaceFit:
    """Fits the coefficients of directions.

    Args:
        curvature: Running curvature of the model, which replays the batches.
        trust: The trust in the slopes along descent directions.

    Attributes:
        reach: Change of the layers' outputs per length of a step, when it was last computed.
    """

    def __init__(self, curvature: RunningCurvature, trust: SlopeTrust) -> None:
        self._curvature = curvature
        self._trust = trust
        self._carried = CarriedFit()
        self._fitted: int | None = None
        self.reach = math.inf

    def is_due(self, step: int) -> bool:
        """Return whether coefficients are to be fitted in a step."""
        return is_due(step, self._fitted, FIT_PERIOD)

    def best_(
        self, objective: Objective, covered: Direction, momentum: Momentum, damping: float
    ) -> Fit:
        """Return the best step in the span of the directions.

        Args:
            objective: The objective.
            covered: The preconditioned gradient of the parameters that have factors.
            momentum: The momentum.
            damping: The damping of the quadratic model.
        """
        directions = descent_directions(objective, covered)
        fit = self.full(objective, directions, momentum, damping)
        return self.keep_(objective, fit, momentum, damping)

    def keep_(self, objective: Objective, fit: Fit, momentum: Momentum, damping: float) -> Fit:
        """Keep the coefficients of a fit for the steps that follow, and return it."""
        descents = len(fit.mix) - bool(momentum.direction)
        own = torch.tensor(fit.mix[:descents] + (0.0,) * (len(fit.mix) - descents))
        own = own.to(fit.coefficients)
        slope, bend = float(fit.model.slope @ own), float(fit.model.bend(own, damping))
        self._carried.keep_(objective, fit.mix[:descents], slope, bend)
        self._fitted = self._curvature.steps
        return fit

    def drop_(self) -> None:
        """Fit anew in the next step, whose coefficients may have been too large in this one."""
        self._fitted = None

    def carried(
        self, objective: Objective, covered: Direction, followed: Direction, damping: float
    ) -> Fit | None:
        """Return the step with the coefficients of the last fit, or ``None`` if they do not hold.

        It takes no Jacobian-vector product. Far from the bound, the change of the layers' outputs
        is not computed but taken to be proportional to the length of the step.

        Args:
            objective: The objective.
            covered: The preconditioned gradient of the parameters that have factors.
            followed: The slow momentum, times learning rates.
            damping: The damping of the quadratic model.
        """
        directions = descent_directions(objective, covered)
        if not self._carried.is_for(objective, len(directions)):
            return None
        mixed = combination(objective.parameters, self._carried.mix, directions)
        products = layer_products((objective.parameters, objective.gradient), followed, mixed)
        model = self._carried.model([*products.values()], damping)
        if model is None:
            return None
        trusted = self._trust.corrected(model, 1)
        scale = trusted.minimum(damping)
        expected = float(trusted.change(scale, damping))
        mix = tuple(float(scale) * c for c in self._carried.mix)
        fit = Fit([mixed], model, scale, expected, mix, products)
        if self.reach * fit.length > CERTAIN_FRACTION * LARGEST_CHANGE:
            return self._bounded(objective, fit, trusted, damping)
        return fit

    def full(
        self,
        objective: Objective,
        directions: Sequence[Direction],
        momentum: Momentum,
        damping: float,
    ) -> Fit:
        """Return the best combination of descent directions and of the momentum.

        The change of the layers' outputs is kept within `LARGEST_CHANGE`.

        Args:
            objective: The objective.
            directions: The descent directions.
            momentum: The momentum.
            damping: The damping of the quadratic model.
        """
        descents, fixed = len(directions), None
        spanned = list(directions)
        if momentum.direction:
            spanned.append(momentum.direction)
            fixed = {descents: momentum.coefficient or 0.0}
        model = quadratic_model(self._curvature.replay, objective, spanned)
        trusted = self._trust.corrected(model, descents)
        coefficients = trusted.minimum(damping, fixed)
        expected = float(trusted.change(coefficients, damping))
        fit = Fit(spanned, model, coefficients, expected, tuple(coefficients.tolist()))
        return self._bounded(objective, fit, trusted, damping)

    def _bounded(
        self, objective: Objective, fit: Fit, trusted: QuadraticModel, damping: float
    ) -> Fit:
        """Return a step, or the largest fraction within the bound on the layers' outputs."""
        if not math.isfinite(fit.expected):
            return fit
        update = fit.update(objective)
        change = self._curvature.relative_change(update, objective.parameters)
        self.reach = change / length if (length := fit.length) else math.inf
        if change <= LARGEST_CHANGE:
            return fit
        if not math.isfinite(change):
            return replace(fit, expected=math.nan)
        scale = LARGEST_CHANGE / change
        return fit.scaled(scale, float(trusted.change(fit.coefficients * scale, damping)))

    schema = Record({"carried": CarriedFit.schema, "fitted": Maybe(COUNT), "reach": NUMBER})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        carried = self._carried.state_dict()
        return {"carried": carried, "fitted": self._fitted, "reach": self.reach}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self._carried.load_state_dict(state["carried"])
        self._fitted, self.reach = state["fitted"], state["reach"]


def descent_directions(objective: Objective, covered: Direction) -> list[Direction]:
    """Return the descent directions; learning rates count relative to the largest one.

    Args:
        objective: The objective.
        covered: The preconditioned gradient of the parameters that have factors.
    """
    largest = max(objective.rates.values()) or 1.0
    factors = {name: -rate / largest for name, rate in objective.rates.items()}
    return [scaled(d, factors) for d in (covered, objective.others) if d]

"""A step as a combination of directions, and what its quadratic model says of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from einconv_kfac.optim.step.fits.quadratic_model import QuadraticModel
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts, scaled_products
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, combination


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
class Along:
    """The quadratic model along a step ``u``, in numbers on the host.

    Args:
        slope: ``g.u``.
        trusted: ``g.u``, with the slopes along descent directions times the trust.
        bend: ``u.(G + W + damping I).u``.
        square: ``u.u``.
        first_slope: ``g.d`` for the first direction ``d``.
        first_square: ``d.d``.
        first_bend: ``d.(G + W).u``.
        last_bend: ``d.(G + W).d'`` for the last direction ``d'``.
    """

    slope: float
    trusted: float
    bend: float
    square: float
    first_slope: float = math.nan
    first_square: float = math.nan
    first_bend: float = math.nan
    last_bend: float = math.nan

    @staticmethod
    def of(
        model: QuadraticModel, trusted: QuadraticModel, coefficients: Tensor, damping: float
    ) -> Tensor:
        """Return its numbers for coefficients ``[m]`` of the directions of a model, ``[8]``.

        Args:
            model: The model.
            trusted: The model with the slopes that are trusted.
            coefficients: The coefficients.
            damping: The damping.
        """
        return torch.stack(
            [
                model.slope @ coefficients,
                trusted.slope @ coefficients,
                model.bend(coefficients, damping),
                coefficients @ model.gram @ coefficients,
                model.slope[0],
                model.gram[0, 0],
                model.curvature[0] @ coefficients,
                model.curvature[0, -1],
            ]
        )

    def scaled(self, factor: float) -> Along:
        """Return it for a multiple of the step."""
        return replace(
            self,
            slope=self.slope * factor,
            trusted=self.trusted * factor,
            bend=self.bend * factor**2,
            square=self.square * factor**2,
            first_bend=self.first_bend * factor,
        )


@dataclass(frozen=True)
class StepAhead:
    """A step that a GPU was asked for before the host has read its length.

    Args:
        update: The step times learning rates, by parameter name.
        value: The objective after it, if the device was asked for that.
    """

    update: Direction
    value: Tensor | None = None


@dataclass(frozen=True)
class Fit:
    """A step: a linear combination of directions.

    Args:
        directions: The directions.
        coefficients: The coefficients.
        along: The quadratic model of the batch along the step.
        mix: The coefficients of the preconditioned gradient, of the direction of parameters
            without factors if there is one, and of a momentum if there is one.
        unobserved: The part of the slope along each direction that the recorded losses do not
            explain; empty if it is not known.
        products: Its inner products by layer, if they are known.
        is_bounded: Whether the bound on the change of the layers' outputs shortened it. With a
            given damping, the objective is evaluated after such a step.
        is_carried: Whether the coefficients are those of an earlier fit.
        ahead: The step itself, if a GPU was asked for it.
    """

    directions: Sequence[Direction]
    coefficients: tuple[float, ...]
    along: Along
    mix: tuple[float, ...]
    unobserved: tuple[float, ...] = ()
    products: dict[str, LayerProducts] | None = None
    is_bounded: bool = False
    is_carried: bool = False
    ahead: StepAhead | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the model is that of the batch, with a coefficient for every direction."""
        return not self.is_carried

    def update(self, objective: Objective, rate: float = 1.0) -> Direction:
        """Return the step times a rate, by parameter name."""
        coefficients = [rate * c for c in self.coefficients]
        return combination(objective.parameters, coefficients, self.directions)

    def predicted(self, rate: float = 1.0) -> float:
        """Return the change of the damped objective on the batch that the model predicts."""
        return self.along.slope * rate + self.along.bend * rate**2 / 2

    @property
    def expected(self) -> float:
        """Return the expected change of the objective, not only on the batch."""
        return self.along.trusted + self.along.bend / 2

    @property
    def length(self) -> float:
        """Return the Euclidean norm of the step."""
        return math.sqrt(max(0.0, self.along.square))

    def scaled(self, factor: float) -> Fit:
        """Return a multiple of the step."""
        if factor == 1:
            return self
        products = self.products
        if products is not None:
            products = scaled_products(products, factor)
        return replace(
            self,
            coefficients=tuple(factor * c for c in self.coefficients),
            along=self.along.scaled(factor),
            mix=tuple(factor * c for c in self.mix),
            products=products,
            ahead=None,
        )

    def moved(self, last: float = 0.0) -> float:
        """Return ``d.(G + W).u`` for the first direction ``d``.

        Args:
            last: Coefficient of the last direction in ``u``, in addition.
        """
        own = self.along
        return own.first_bend + last * own.last_bend if last else own.first_bend

    def with_slow_momentum(self) -> Fit:
        """Return the step with a slow momentum ``m``, along which no curvature was computed.

        The change of the slope ``g.d`` by ``m`` is taken to be to that by the step ``u`` as
        ``g.m`` is to ``g.u``. That holds where ``d`` is ``-(G + W)^-1 g``.
        """
        own = self.along
        past = sum(each.past for each in (self.products or {}).values())
        last = own.first_bend * past / own.slope if own.slope else 0.0
        return replace(self, along=replace(own, last_bend=last), mix=(*self.mix, 0.0))

    @property
    def is_failure(self) -> bool:
        """Whether the model is not finite, or its step has no length though there is a slope.

        Directions whose squares underflow are none: the gradient is then as good as zero.
        """
        if not math.isfinite(self.expected):
            return True
        own = self.along
        return not any(self.mix) and own.first_slope != 0 and own.first_square > 0

    @property
    def rank(self) -> float:
        """Return the expected change, or infinity if that is not a number."""
        return math.inf if math.isnan(self.expected) else self.expected

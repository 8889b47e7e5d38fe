"""The quadratic model of the objective in the span of a few directions.

For directions ``d_i`` and ``u = sum_i c_i d_i``::

    M(u) = b.c + 1/2 c.(Q c),   b_i = g.d_i,   Q_ij = d_i.(G + W + damping I).d_j

with the gradient ``g`` (weight decay included), the exact generalised Gauss-Newton matrix
``G`` on the batch and the weight decay ``W`` (diagonal). ``d_i.G.d_j`` is the loss Hessian at
the output between the Jacobian-vector products ``J d_i`` and ``J d_j``, so neither a gradient
nor a backward pass is needed (Martens and Grosse, 2015).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.late_numbers import LateNumbers
from einconv_kfac.curvature.objective.loss_model import Expansion
from einconv_kfac.optim.replay.jvp import Tangents
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, gram_matrix, inner, inner_products, sum_of


@dataclass(frozen=True)
class QuadraticModel:
    """The model's coefficients, in float64 on the host.

    Args:
        slope: ``g.d_i``, ``[m]``.
        curvature: ``d_i.(G + W).d_j``, ``[m, m]``.
        gram: ``d_i.d_j``, ``[m, m]``.
        unobserved: The part of the slope that the recorded losses do not explain, ``[m]``, or
            ``None`` if it is not known.
    """

    slope: Tensor
    curvature: Tensor
    gram: Tensor
    unobserved: Tensor | None = None

    def minimum(self, damping: float, fixed: Mapping[int, float] | None = None) -> Tensor:
        """Return the coefficients ``c [m]`` that minimise the damped model.

        Args:
            damping: Multiple of the identity that is added to the curvature.
            fixed: Coefficients that are given, by index.
        """
        fixed = fixed or {}
        free = [index for index in range(len(self.slope)) if index not in fixed]
        matrix = self.curvature + damping * self.gram
        c = torch.zeros_like(self.slope)
        for index, value in fixed.items():
            c[index] = value
        c[free] = -_solve(matrix[free][:, free], (self.slope + matrix @ c)[free])
        return c

    def downhill(self, damping: float, fixed: Mapping[int, float] | None = None) -> Tensor:
        """Return `minimum` where it follows no direction uphill, else separate minima ``[m]``.

        The minimum of one batch follows a direction uphill to make up for another one, which is
        along the noise of this batch as much as along what batches share. The minima along single
        directions, with the common length that minimises the model, do not.

        Args:
            damping: Multiple of the identity that is added to the curvature.
            fixed: Coefficients that are given, by index; these may be of either sign.
        """
        fixed = fixed or {}
        free = [index for index in range(len(self.slope)) if index not in fixed]
        c = self.minimum(damping, fixed)
        if not bool((self.slope * c)[free].gt(0).any()):
            return c
        matrix = self.curvature + damping * self.gram
        right = self.slope + matrix @ c.index_fill(0, torch.tensor(free), 0)
        own = matrix[free][:, free]
        separate = -torch.where(own.diagonal() > 0, self.slope[free] / own.diagonal(), 0.0)
        c[free] = separate * -(right[free] @ separate) / (separate @ own @ separate)
        return c

    def change(self, coefficients: Tensor, damping: float) -> Tensor:
        """Return ``M(u)``, the predicted change of the damped objective."""
        return self.slope @ coefficients + self.bend(coefficients, damping) / 2

    def bend(self, coefficients: Tensor, damping: float) -> Tensor:
        """Return ``u.(G + W + damping I).u``, the damped curvature along a step."""
        matrix = self.curvature + damping * self.gram
        bend: Tensor = coefficients @ matrix @ coefficients
        return bend


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a positive semi-definite matrix; directions in its null space get zero."""
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)  # zero where a square underflowed
    correlation = (matrix * scale.unsqueeze(0) * scale.unsqueeze(1)).clamp(-1, 1)
    inverse = torch.linalg.pinv(correlation, hermitian=True, rtol=1e-10)
    solution: Tensor = scale * (inverse @ (scale * right))
    return solution


class Products:
    """Jacobian-vector products on the batches of an objective, each computed once.

    Args:
        replay: Runs the model again.
        objective: The objective, of at least one batch.

    Attributes:
        doubts: Flags that must be set for the products to be right, see `Replay.doubting`.
        pending: A model that the device was asked for, and the host has not read.
    """

    def __init__(self, replay: Replay, objective: Objective) -> None:
        self._replay = replay
        self._objective = objective
        self._known: dict[int, tuple[Direction, list[Tangents]]] = {}
        self._may_doubt = objective.workers.size == 1  # others would wait for one that repeats it
        self.doubts: list[Tensor] = []
        self.pending: PendingModel | None = None

    def settle_(self, flags: Sequence[float]) -> bool:
        """Return whether all products are right; if not, they are forgotten.

        Args:
            flags: The `doubts`, which the host has read.
        """
        self.doubts = []
        if not all(flags):
            self._known, self._may_doubt = {}, False
        return all(flags)

    def expansions(self, directions: Sequence[Direction]) -> list[Expansion]:
        """Return slope and curvature of each batch's loss along directions."""
        batches, parameters = self._objective.batches, self._objective.parameters
        new = [direction for direction in directions if id(direction) not in self._known]
        if new:
            none: AbstractContextManager[list[Tensor]] = nullcontext([])
            with self._replay.doubting() if self._may_doubt else none as doubts:
                found = [self._replay.jacobian_products(b, parameters, new) for b in batches]
            self.doubts += doubts
            for direction, *own in zip(new, *found):
                self._known[id(direction)] = direction, own  # which keeps its id
        tangents = [
            [self._known[id(d)][1][index] for d in directions] for index in range(len(batches))
        ]
        return [
            self._replay.expansion(batch, directions, own) for batch, own in zip(batches, tangents)
        ]


def quadratic_model(
    replay: Replay,
    objective: Objective,
    directions: Sequence[Direction],
    products: Products | None = None,
) -> QuadraticModel:
    """Return the quadratic model of an objective in the span of directions.

    Args:
        replay: Runs the model again.
        objective: The objective, of at least one batch.
        directions: The directions ``d_i``.
        products: Products of this objective that are known.
    """
    products = Products(replay, objective) if products is None else products
    pending, products.pending = products.pending, None
    if pending is None or not pending.is_of(directions):
        pending = PendingModel(objective, directions, products)
    model = pending.read()
    return quadratic_model(replay, objective, directions, products) if model is None else model


class PendingModel:
    """The quadratic model before the host has read it.

    Args:
        objective: The objective, of at least one batch.
        directions: The directions ``d_i``.
        products: Products of this objective that are known.
    """

    def __init__(
        self, objective: Objective, directions: Sequence[Direction], products: Products
    ) -> None:
        self.directions, self.products = directions, products
        self._rows, self._part = _rows(objective, directions, products)
        doubts = [flag.to(self._rows).reshape(1) for flag in products.doubts]
        self._numbers = torch.cat([self._rows.flatten(), *doubts])
        self._late = LateNumbers(self._numbers) if self._numbers.is_cuda else None

    def is_of(self, directions: Sequence[Direction]) -> bool:
        """Return whether these are its directions."""
        pairs = zip(self.directions, directions)
        return len(self.directions) == len(directions) and all(own is other for own, other in pairs)

    def read(self) -> QuadraticModel | None:
        """Return the model; ``None`` if a product is to be made again."""
        known, size, count = self._numbers, self._rows.numel(), self._rows.shape[1]
        if self._late is not None:
            known = torch.tensor(self._late.read(), dtype=known.dtype)
        if not self.products.settle_(known[size:].tolist() if len(known) > size else ()):
            return None
        slope, unobserved, *squares = known[:size].reshape(-1, count)
        own = torch.stack(squares[:count]), torch.stack(squares[count:])
        return QuadraticModel(slope, *own, None if self._part else unobserved)


def _rows(
    objective: Objective, directions: Sequence[Direction], products: Products
) -> tuple[Tensor, float]:
    """Return the coefficients of the model in the span of ``m`` directions.

    Returns:
        Rows ``[2 + 2 m, m]``: the slope, its part that the recorded losses do not explain, and
        both matrices; and whether that part is not known.
    """
    slope = inner_products(objective.gradient, directions)
    weights = [batch.weight.double() for batch in objective.batches]
    parts = list(zip(weights, products.expansions(directions)))
    curvature = sum_of([weight * part.curvature for weight, part in parts])
    observed = sum_of([weight * part.slope for weight, part in parts])
    if any(objective.decay.values()):
        curvature = curvature + gram_matrix(directions, objective.decay)
        decay = [inner(d, objective.parameters, objective.decay) for d in directions]
        observed = observed + torch.stack(decay)
    is_part = any(b.subset is not None or b.has_moved for b in objective.batches)
    rows = torch.stack([slope, slope - observed, *curvature, *gram_matrix(directions)])
    rows, part = objective.workers.means([rows, float(is_part)], "quadratic model")
    return rows, part

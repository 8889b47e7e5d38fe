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
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import Direction, gram_matrix, inner, inner_products, sum_of


@dataclass(frozen=True)
class QuadraticModel:
    """The model's coefficients, in float64.

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

    def unobserved_fraction(self) -> float:
        """Return the fraction of the first slope that the recorded losses do not explain."""
        if self.unobserved is None or not bool(self.slope[0]):
            return 0.0
        return float((self.unobserved[0] / self.slope[0]).abs())

    def change(self, coefficients: Tensor, damping: float) -> Tensor:
        """Return ``M(u)``, the predicted change of the damped objective."""
        matrix = self.curvature + damping * self.gram
        change: Tensor = self.slope @ coefficients + coefficients @ matrix @ coefficients / 2
        return change


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a positive semi-definite matrix; directions in its null space get zero."""
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)  # zero where a square underflowed
    correlation = (matrix * scale.unsqueeze(0) * scale.unsqueeze(1)).clamp(-1, 1)
    inverse = torch.linalg.pinv(correlation, hermitian=True, rtol=1e-10)
    solution: Tensor = scale * (inverse @ (scale * right))
    return solution


def quadratic_model(
    replay: Replay, objective: Objective, directions: Sequence[Direction]
) -> QuadraticModel:
    """Return the quadratic model of an objective in the span of directions.

    Args:
        replay: Runs the model again.
        objective: The objective, of at least one batch.
        directions: The directions ``d_i``.
    """
    slope = inner_products(objective.gradient, directions)
    parts = [
        (batch.weight.double(), replay.expansion(batch, objective.parameters, directions))
        for batch in objective.batches
    ]
    curvature = sum_of([weight * part.curvature for weight, part in parts])
    observed = sum_of([weight * part.slope for weight, part in parts])
    if any(objective.decay.values()):
        curvature = curvature + gram_matrix(directions, objective.decay)
        decay = [inner(d, objective.parameters, objective.decay) for d in directions]
        observed = observed + torch.stack(decay)
    is_part = any(b.subset is not None or b.has_moved for b in objective.batches)
    own = [slope, curvature, gram_matrix(directions), observed, float(is_part)]
    slope, curvature, gram, observed, part = objective.workers.means(own, "quadratic model")
    return QuadraticModel(slope, curvature, gram, None if part else slope - observed)

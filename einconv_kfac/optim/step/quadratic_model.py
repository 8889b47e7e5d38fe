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

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.vectors import Direction, inner, sum_of


@dataclass(frozen=True)
class QuadraticModel:
    """The model's coefficients, in float64.

    Args:
        slope: ``g.d_i``, ``[m]``.
        curvature: ``d_i.(G + W).d_j``, ``[m, m]``.
        gram: ``d_i.d_j``, ``[m, m]``.
    """

    slope: Tensor
    curvature: Tensor
    gram: Tensor

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

    def change(self, coefficients: Tensor, damping: float) -> Tensor:
        """Return ``M(u)``, the predicted change of the damped objective."""
        matrix = self.curvature + damping * self.gram
        change: Tensor = self.slope @ coefficients + coefficients @ matrix @ coefficients / 2
        return change


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Solve with a positive semi-definite matrix; directions it does not see get zero."""
    diagonal = matrix.diagonal()
    scale = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)  # zero where a square underflowed
    correlation = (matrix * scale.unsqueeze(0) * scale.unsqueeze(1)).clamp(-1, 1)
    inverse = torch.linalg.pinv(correlation, hermitian=True, rtol=1e-10)
    solution: Tensor = scale * (inverse @ (scale * right))
    return solution


def quadratic_model(
    replay: Replay,
    batches: Sequence[Batch],
    point: tuple[Direction, Direction, Mapping[str, float]],
    directions: Sequence[Direction],
) -> QuadraticModel:
    """Build the quadratic model on the recorded batches.

    Args:
        replay: Runs the model again.
        batches: The batches of the objective, at least one.
        point: Parameters, gradient, and weight decay by parameter name.
        directions: The directions ``d_i``.
    """
    parameters, gradient, decay = point
    slope = torch.stack([inner(gradient, d) for d in directions])
    curvature = sum_of(
        [b.weight.double() * _curvature(replay, b, parameters, directions) for b in batches]
    )
    if any(decay.values()):
        curvature = curvature + _products(directions, decay)
    return QuadraticModel(slope, curvature, _products(directions))


def _products(
    directions: Sequence[Direction], weights: Mapping[str, float] | None = None
) -> Tensor:
    """Return the inner products of all pairs of directions, ``[m, m]``."""
    rows = [torch.stack([inner(a, b, weights) for b in directions]) for a in directions]
    return torch.stack(rows)


def _curvature(
    replay: Replay, batch: Batch, parameters: Direction, directions: Sequence[Direction]
) -> Tensor:
    """Return ``d_i.G.d_j`` of one batch, ``[m, m]``; an unbiased estimate from its subset.

    The loss and its Hessian are those of the whole batch, whatever its reduction divides by.
    """
    tangents = replay.jacobian_products(batch, parameters, directions)
    precise = torch.promote_types(batch.output.dtype, torch.float32)
    output = batch.output.detach().to(precise).requires_grad_()
    with torch.enable_grad():
        loss = replay.loss(output, batch.target)
        (slope,) = torch.autograd.grad(loss, output, create_graph=True)
    tangents = [tangent.to(precise) for tangent in tangents]
    if batch.subset is not None:
        tangents = [batch.subset.scattered(tangent) for tangent in tangents]
    products = [torch.autograd.grad(slope, output, t, retain_graph=True)[0] for t in tangents]
    left = torch.stack(tangents).flatten(1).double()
    curvature = left @ torch.stack(products).flatten(1).double().T
    return curvature if batch.subset is None else curvature * batch.subset.scale

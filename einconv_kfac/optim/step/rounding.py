"""The rounding of the objective, below which its changes carry no information."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import entries, precise, sum_of

ROUNDING_MARGIN = 4.0
"""Multiple of the rounding that a predicted change must exceed, so that the reduction ratio is
known to about a quarter."""


def rounding_of(objective: Objective) -> Tensor:
    """Return an estimate of the rounding error of the objective, in float64.

    It is the sum of three parts: the losses times the machine epsilon of their data type; the
    root of ``sum (g w)^2`` times that of the forward pass, which computes with parameters ``w``
    that are perturbed independently (``g`` is the gradient); and ``sum |g w|`` times half of
    that of the parameters, which the rounding of a step that was added to them can amount to.

    Args:
        objective: The objective, before its parameters are moved.
    """
    losses = [
        (batch.weight * batch.loss).abs().double() * torch.finfo(batch.loss.dtype).eps
        for batch in objective.batches
    ]
    squares, sums = [], []
    for name, parameter in objective.parameters.items():
        dtype = torch.promote_types(precise(parameter.dtype), objective.gradient[name].dtype)
        products = entries(parameter.to(dtype)) * entries(objective.gradient[name].to(dtype))
        squares.append(torch.dot(products, products).double())
        sums.append(products.abs().sum().double() * torch.finfo(parameter.dtype).eps / 2)
    return sum_of([*losses, sum_of(squares).sqrt() * _precision(objective), *sums])


def _precision(objective: Objective) -> float:
    """Return the largest machine epsilon of the forward passes."""
    found = [0.0]
    for batch in objective.batches:
        assert batch.forward is not None
        found.append(batch.forward.call.environment.precision(batch.output.dtype))
    return max(found)

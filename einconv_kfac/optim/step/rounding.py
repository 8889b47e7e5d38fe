"""The rounding of the objective, below which its changes carry no information."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.vectors import entries, sum_of

ROUNDING_MARGIN = 4.0
"""Multiple of the rounding that a predicted change must exceed, so that the reduction ratio is
known to about a quarter."""


def rounding_of(replay: Replay, objective: Objective) -> Tensor:
    """Return an estimate of the rounding error of the objective, in float64.

    It is a sum over losses of `_of_batch`, and of ``sum |g w|`` over parameters ``w`` with
    gradient ``g``, times half the machine epsilon of the parameters: what rounding takes from a
    step that is added to them.

    Args:
        replay: Evaluates the losses again.
        objective: The objective, before its parameters are moved.
    """
    parts = [_of_batch(replay, batch) for batch in objective.batches]
    pairs = [(p, objective.gradient[name]) for name, p in objective.parameters.items()]
    epsilons = [torch.finfo(parameter.dtype).eps / 2 for parameter, _ in pairs]
    left, right = ([entries(own) for own in side] for side in zip(*pairs))
    products = torch._foreach_mul(torch._foreach_norm(torch._foreach_mul(left, right), 1), epsilons)
    own = sum_of([*parts, torch.stack(products).sum(dtype=torch.float64)])
    return cast("Tensor", objective.workers.means([own], "rounding")[0])


def _of_batch(replay: Replay, batch: Batch) -> Tensor:
    """Return the rounding error of one loss, times its weight in the objective.

    It is the loss times the machine epsilon of the type in which its changes are computed, and the
    Euclidean norm of ``dL/dy y`` over the entries of the output ``y``, times the machine epsilon of
    the forward pass: the errors of the entries are independent.
    """
    dtype = batch.loss.dtype if batch.loss_model is None else batch.loss_model.precision()
    value = batch.loss.abs().double() * torch.finfo(dtype).eps
    precisions = [each.call.environment.precision for each in batch.forwards for _ in each.inputs]
    for output, slope, precision in zip(batch.outputs, replay.slopes(batch), precisions):
        if slope is not None:
            products = entries(slope).double() * entries(output).double()
            products = products.where(products.isfinite(), 0)  # as of masked scores
            moved: Tensor = torch.linalg.vector_norm(products)
            value = value + moved * precision(output.dtype)
    return batch.weight.abs().double() * value

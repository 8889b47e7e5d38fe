"""What the reading of a loss takes as its curvature by a tensor that counts as a model's output."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.curvature.objective.tail import Tail

Loss = Callable[[Tensor], Tensor]
_NAME = "test"


def read_loss(loss: Loss, x: Tensor, last: Loss | None = None) -> Tail:
    """Return a loss as a function of an output, after its graph is freed.

    Args:
        loss: The loss of the output.
        x: The output, or what its last operation is applied to.
        last: The last operation of the model.
    """
    before = x.clone().requires_grad_()
    output = before * 1.0 if last is None else last(before)
    mark_(output, _NAME, output.detach())
    value = loss(output)
    given = edge_of(value), value.detach(), torch.ones_like(value)
    reading = Reading(*given, lambda edge: mark_of(edge, _NAME), {})
    tail = reading.tail(reading.graph.sources)
    value.backward()
    return tail


def loss_curvature(loss: Loss, x: Tensor, last: Loss | None = None) -> Tensor:
    """Return the matrix by the entries of an output; for the arguments see `read_loss`."""
    tail = read_loss(loss, x, last)
    units = torch.eye(x.numel(), dtype=x.dtype).reshape(-1, *x.shape)
    return tail.expansion([[unit] for unit in units]).curvature

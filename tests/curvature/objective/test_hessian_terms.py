"""Hessians of a loss by tensors computed from outputs, where no single operation gives them."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
ROOT = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)


def reading_of(loss: Tensor, output: Tensor) -> Reading:
    mark_(output, "test", output.detach())
    given = edge_of(loss), loss.detach(), torch.ones_like(loss)
    return Reading(*given, lambda edge: mark_of(edge, "test"), {})


def test_a_hessian_behind_a_nonlinear_operation_outlives_the_graph() -> None:
    """As in a step that fits coefficients and updates no factors."""
    output = X.clone().requires_grad_() * 1.0
    hidden = output.tanh()
    loss = ((hidden @ ROOT @ ROOT.T) * hidden).sum()
    tail = (reading := reading_of(loss, output)).tail(reading.graph.sources)
    loss.backward()  # frees the graph
    u = torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
    tangent = (1 - hidden.detach().square()) * u
    expected = 2 * (tangent @ ROOT).square().sum()
    torch.testing.assert_close(tail.expansion([[u]]).curvature, expected.reshape(1, 1))

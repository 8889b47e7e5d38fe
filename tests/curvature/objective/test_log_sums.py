"""Logarithms of sums of exponentials, against Hessians of the same losses, for many terms."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import hessian, jvp

from einconv_kfac.curvature.objective.graph import edge_of, mark_, mark_of
from einconv_kfac.curvature.objective.reading import Reading

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
WIDE = torch.randn(3, 70, generator=GENERATOR, dtype=torch.float64)
MASK = (torch.rand(3, 70, generator=GENERATOR) < 0.7).double()
ROWS = torch.randn(70, 2, generator=GENERATOR, dtype=torch.float64)
LOSSES: dict[str, Loss] = {
    "kept dimension": lambda o: ((o.exp() * MASK).sum(1, keepdim=True).log() - o)[:, 1:5].sum(),
    "dropped dimension": lambda o: (0.5 * o.exp()).mean(0).log().mean(),
    "weights": lambda o: (o.exp() @ MASK[0]).log() @ MASK[:, 0],
}


def reading_of(loss: Loss, x: Tensor) -> Reading:
    output = x.clone().requires_grad_() * 1.0
    mark_(output, "test", output.detach())
    value = loss(output)
    given = edge_of(value), value.detach(), torch.ones_like(value)
    return Reading(*given, lambda edge: mark_of(edge, "test"), {})


def curvature(loss: Loss, x: Tensor, u: Tensor) -> float:
    reading = reading_of(loss, x)
    return reading.tail(reading.graph.sources).expansion([[u]]).curvature.item()


@pytest.mark.parametrize("name", LOSSES)
def test_hessians(name: str) -> None:
    u = torch.randn(WIDE.shape, generator=GENERATOR, dtype=torch.float64)
    matrix = hessian(LOSSES[name])(WIDE).reshape(WIDE.numel(), WIDE.numel())
    assert curvature(LOSSES[name], WIDE, u) == pytest.approx(
        float(u.flatten() @ matrix @ u.flatten())
    )


def test_similarities_have_a_gauss_newton_matrix() -> None:
    """As in a supervised contrastive loss, for a batch of any size."""
    others = 1 - torch.eye(len(ROWS)).double()

    def of_scores(s: Tensor) -> Tensor:
        return ((s.exp() * others).sum(1, keepdim=True).log() - s)[:, :3].mean()

    def loss(o: Tensor) -> Tensor:
        return of_scores(o @ o.T)

    u = torch.randn(ROWS.shape, generator=GENERATOR, dtype=torch.float64)
    scores, tangent = jvp(lambda o: o @ o.T, (ROWS,), (u,))
    _, product = jvp(torch.func.grad(of_scores), (scores,), (tangent,))
    assert curvature(loss, ROWS, u) == pytest.approx(float((tangent * product).sum()))


def test_exponentials_with_another_use() -> None:
    """The Hessian by what they are computed from is taken."""

    def loss(o: Tensor) -> Tensor:
        terms = (o @ ROWS.T).exp()
        return terms.sum(1).log().sum() + terms.square().sum() / 100

    x, u = torch.randn(2, 2, 2, generator=GENERATOR, dtype=torch.float64)
    matrix = hessian(loss)(x).reshape(4, 4)
    assert curvature(loss, x, u) == pytest.approx(float(u.flatten() @ matrix @ u.flatten()))

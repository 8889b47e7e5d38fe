"""Losses that are divided by parameters, as by variances that are learned with the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.curvature.objective.nodes.bilinear import Quotient

Form = Callable[[Tensor, Tensor], Tensor]
"""Returns a loss for that of a task and a parameter."""
FORMS: dict[str, tuple[Form, Form]] = {
    "exponential": (
        lambda loss, s: loss / s.exp() + s,
        lambda loss, s: loss * s.exp().reciprocal() + s,
    ),
    "square": (
        lambda loss, s: loss / (2 * (1 + s) ** 2) + (1 + s).log(),
        lambda loss, s: loss * (2 * (1 + s) ** 2).reciprocal() + (1 + s).log(),
    ),
    "itself": (lambda loss, s: loss / (1 + s) + s, lambda loss, s: loss * (1 + s).reciprocal() + s),
}
"""A quotient, and the product with the reciprocal, by name."""
RULE = Quotient("Div", torch.div, ("self", "other"), (frozenset({0}),))


class Net(nn.Module):
    """A classifier with a parameter that the loss alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.s = nn.Linear(3, 3), nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def trained(form: Form) -> tuple[list[float], list[Tensor]]:
    """Return the ratios of the first steps, and the parameters after them."""
    torch.manual_seed(0)
    model, ratios = Net().double(), list[float]()
    opt = KFAC(model, fisher="exact")
    x, y = torch.randn(8, 3).double(), torch.arange(8) % 3
    for _ in range(4):
        opt.zero_grad()
        opt.observe(form(functional.cross_entropy(model(x), y), model.s)).backward()
        opt.step()
        ratios.append(opt.statistics()["ratio"])
    return ratios, [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("name", FORMS)
def test_a_quotient_is_the_product_with_the_reciprocal(name: str) -> None:
    quotient, product = FORMS[name]
    (ratios, found), (_, expected) = trained(quotient), trained(product)
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert all(ratio > 0.5 for ratio in ratios)


@pytest.mark.parametrize(("a", "sign"), [((3,), 1.0), ((2, 3), 1.0), ((3,), -1.0)])
def test_the_curvature_is_the_second_derivative(a: tuple[int, ...], sign: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(a, requires_grad=True, dtype=torch.float64)
    b = torch.rand(3, requires_grad=True, dtype=torch.float64)
    node: Any = (x / b).grad_fn
    weight = sign * torch.rand(torch.broadcast_shapes(a, (3,)), dtype=torch.float64)
    found = RULE.by_denominator(node, weight)
    if sign < 0:
        assert found is None
        return
    assert found is not None
    hessian = torch.func.hessian(lambda own: (weight * x.detach() / own).sum())(b.detach())
    torch.testing.assert_close(found.values, hessian.diagonal())
    torch.testing.assert_close(hessian.diagonal().diag(), hessian)


def test_a_rounded_quotient_is_rounded_again_and_has_no_curvature() -> None:
    x = torch.tensor([3.0, 5.0], requires_grad=True)
    b = torch.tensor([2.0, 2.0], requires_grad=True)
    expected = torch.div(x, b, rounding_mode="floor")
    node: Any = expected.grad_fn
    assert torch.equal(RULE.function(node)(x, b), expected)
    assert RULE.by_denominator(node, torch.ones(2)) is None

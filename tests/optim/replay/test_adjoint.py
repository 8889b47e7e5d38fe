"""Models that forward mode differentiates otherwise than the backward pass does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(24, 3, generator=GENERATOR, dtype=torch.float64)


class Equilibrium(nn.Module):
    """A fixed point that is iterated without gradients, and one iteration with them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(8, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = x.new_zeros(len(x), 8)
            for _ in range(5):
                z = torch.tanh(self.inner(z) + self.outer(x))
        output: Tensor = self.head(torch.tanh(self.inner(z) + self.outer(x)))
        return output


class Rescaled(nn.Module):
    """A network whose features are divided by their size, as a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        with torch.no_grad():
            size = features.norm(dim=0) / len(x) ** 0.5
        output: Tensor = self.head(torch.tanh(features / size))
        return output


class StraightThrough(nn.Module):
    """A network with codes that let gradients through where features require them."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        features = self.first(x)
        codes = features.detach().round(decimals=1)
        if features.requires_grad:
            codes = features + (codes - features).detach()
        output: Tensor = self.head(codes)
        return output


@torch.library.custom_op("einconv_kfac_tests::cube", mutates_args=())
def cube(x: Tensor) -> Tensor:
    """Return cubes; forward mode drops the tangents of such an operator without an error."""
    return x**3


cube.register_autograd(
    lambda ctx, gradient: 3 * ctx.saved_tensors[0] ** 2 * gradient,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


class Cubes(nn.Module):
    """A network with cubes of its features."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(cube(self.first(x)))
        return output


def curvature_along(model: nn.Module, step: list[Tensor]) -> float:
    """Return ``u^T G u`` of the squared error, by two backward passes."""
    output = model(X)
    w = torch.zeros_like(output, requires_grad=True)
    own = torch.autograd.grad(output, list(model.parameters()), w, create_graph=True)
    (tangent,) = torch.autograd.grad(own, w, step)
    return float(2 * tangent.square().mean())


@pytest.mark.parametrize("build", [Equilibrium, Rescaled, StraightThrough, Cubes])
def test_the_step_minimises_the_quadratic_model_of_autograd(
    build: Callable[[], nn.Module],
) -> None:
    """``g.u + u.(G + damping) u = 0`` for the minimum along any directions."""
    torch.manual_seed(0)
    model, loss_fn, damping = build().double(), nn.MSELoss(), 5.0
    opt = KFAC(model, loss_fn, momentum=0.0, damping=damping, fisher="exact")
    loss_fn(model(X), Y).backward()
    parameters = list(model.parameters())
    before = [p.detach().clone() for p in parameters]
    slope = [p.grad.clone() for p in parameters if p.grad is not None]
    opt.step()
    step = [p.detach() - b for p, b in zip(parameters, before)]
    with torch.no_grad():
        for p, b in zip(parameters, before):
            p.copy_(b)
    along = sum(float((g * u).sum()) for g, u in zip(slope, step))
    size = sum(float(u.square().sum()) for u in step)
    curvature = curvature_along(model, step) + damping * size
    assert along < 0
    assert curvature == pytest.approx(-along, rel=1e-9)


class CalledAgain(torch.autograd.Function):
    """Calls a module without a graph, and again in the backward pass, as adjoint solvers do."""

    @staticmethod
    def forward(ctx: Any, module: nn.Module, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(x, *parameters)
        output: Tensor = module(x)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            output = ctx.module(x.detach())
        found = torch.autograd.grad(output, parameters, gradient, allow_unused=True)
        return None, None, *found


class Solved(nn.Module):
    """A network whose first layer computes its gradients by calling itself again."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        own = [parameter for parameter in self.inner.parameters() if parameter.requires_grad]
        output: Tensor = self.head(torch.tanh(CalledAgain.apply(self.inner, x, *own)))
        return output


def test_a_backward_pass_that_calls_the_model_again_is_refused() -> None:
    model = Solved().double()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    opt = KFAC(model, exclude=["inner"])
    opt.observe(nn.functional.mse_loss(model(X), Y)).backward()
    with pytest.raises(RuntimeError, match="calls parts of the model again in `backward`"):
        opt.step()
    for parameter, value in zip(model.parameters(), before):
        assert torch.equal(parameter, value)

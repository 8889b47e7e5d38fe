"""Complex parameters, which are trained as their real and their imaginary parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature import coverage, kronecker_factors

FIXED = {"adaptive": False, "lr": 0.05}


class Modulus(nn.Module):
    """``|x w + conj(b)| + Im(x w)`` of complex parameters, or of pairs of real ones."""

    def __init__(self, split: bool, values: list[Tensor]) -> None:
        super().__init__()
        parts = [[v.real.clone(), v.imag.clone()] if split else [v.clone()] for v in values]
        self.parts = nn.ParameterList([part for own in parts for part in own])

    def values(self) -> list[Tensor]:
        own = list(self.parts)
        if own[0].is_complex():
            return own
        return [torch.complex(*pair) for pair in zip(own[::2], own[1::2])]

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.values()
        return (x @ w + b.conj()).abs() + (x @ w).imag


class Exponential(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * x.exp()


class Decay(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Exponential.apply(-x)


def trained(split: bool, *, backward: bool = False, reload: bool = False, **options: Any) -> Tensor:
    """Return the complex values after five steps."""
    torch.manual_seed(0)
    x, y = torch.randn(32, 4, dtype=torch.complex128), torch.randn(32, 3).double()
    start = [torch.randn(shape, dtype=torch.complex128) for shape in ((4, 3), (3,))]
    extra = [Decay()] if backward else []
    model = nn.Sequential(Modulus(split, start), *extra, nn.Linear(3, 3).double())
    loss_fn = nn.MSELoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for step in range(3):
        rows = torch.randperm(32, generator=torch.Generator().manual_seed(step))[:16]
        opt.zero_grad()
        loss_fn(model(x[rows]), y[rows]).backward()
        opt.step()
        if reload and step == 2:
            state, opt = opt.state_dict(), KFAC(model, loss_fn, fisher="exact", **options)
            opt.load_state_dict(state)
    return torch.cat([v.detach().flatten() for v in model[0].values()])


@pytest.mark.parametrize(
    "options",
    [
        {"fallback": "gradient", "weight_decay": 0.1},
        {"fallback": "adam", "weight_decay": 0.1, "safeguard": True},
        {"momentum": 0.5},
        {"damping": 0.1, "reload": True},
        {"backward": True},
        {"backward": True, "fallback": "gradient"},
        {"inverse": "ekfac", "curvature_fraction": 0.5},
        {"exclude": "*"},
        {**FIXED, "fallback": "gradient", "weight_decay": 0.1},
        {**FIXED, "fallback": "adam", "reload": True},
        {**FIXED, "nesterov": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {**FIXED, "max_step_norm": 0.1},
    ],
)
def test_steps_are_those_of_pairs_of_real_parameters(options: dict[str, Any]) -> None:
    torch.testing.assert_close(trained(False, **options), trained(True, **options))


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 5, dtype=torch.complex128)
        self.c = nn.Conv1d(1, 1, 1, dtype=torch.complex128)
        self.b = nn.Linear(5, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(self.c(x[:, None])[:, 0]).abs())


def test_complex_layers_are_left_to_the_fallback_by_name() -> None:
    torch.manual_seed(0)
    model, loss_fn = Layers(), nn.MSELoss()
    x, y = torch.randn(16, 4, dtype=torch.complex128), torch.randn(16, 3).double()
    opt = KFAC(model, loss_fn)
    kinds = {name: "kfac" if name.startswith("b.") else "adam" for name in opt.coverage()}
    assert opt.coverage() == kinds
    reasons = {row.parameter: row.reason for row in coverage(model).gaps()}
    assert reasons == dict.fromkeys(
        ("a.weight", "a.bias", "c.weight", "c.bias"), "its parameters are complex"
    )
    found = kronecker_factors(model, loss_fn, [(x, y)])
    assert set(found.parameters) == {"b.weight", "b.bias"}
    with pytest.raises(ValueError, match=r"got none for 'a.weight' \(Linear\)"):
        KFAC(model, loss_fn, strict=True)
    losses = []
    for _ in range(10):
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]

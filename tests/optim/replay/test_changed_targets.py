"""Tensors that a script fills anew after the backward pass, and before the step or for the next."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from optim_cases import weights
from torch import Generator, Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.curvature.losses.snapshot import LARGEST_COPY

GENERATOR = Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(24, 3, generator=GENERATOR, dtype=torch.float64)
MASK = torch.rand(24, generator=GENERATOR, dtype=torch.float64)
Loss = Callable[[KFAC, nn.Module, Tensor, Tensor, Tensor], Tensor]


class Hinge(nn.Module):
    """A loss of several operations, without a rule."""

    def forward(self, out: Tensor, target: Tensor) -> Tensor:
        return functional.softplus(1 - out * target.sign()).pow(1.5).mean()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3), nn.Sigmoid()).double()


def trained(loss_fn: nn.Module | None, loss: Loss, *, changes: bool) -> Tensor:
    """Return the parameters after three steps, before which everything is overwritten or not."""
    model = net()
    opt = KFAC(model, loss_fn, fisher="exact")
    x, y, mask = X.clone(), Y.clone(), MASK.clone()
    for index in range(3):
        x.copy_(X.roll(index, 0))
        y.copy_(Y.roll(index, 0))
        mask.copy_(MASK)
        opt.zero_grad()
        loss(opt, model, x, y, mask).backward()
        if changes:
            x.zero_()
            y[:12] = 7.0
            mask.zero_()
        opt.step()
    return weights(model)


GIVEN = [nn.MSELoss(), nn.BCELoss(), nn.L1Loss(), Hinge()]


@pytest.mark.parametrize("loss_fn", GIVEN, ids=lambda own: type(own).__name__)
def test_a_target_of_a_module(loss_fn: nn.Module) -> None:
    """As the labels of real and generated images, which share a buffer."""

    def loss(_: KFAC, model: nn.Module, x: Tensor, y: Tensor, __: Tensor) -> Tensor:
        found: Tensor = loss_fn(model(x), y.sigmoid_())
        return found

    found, expected = (trained(loss_fn, loss, changes=own) for own in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


OBSERVED: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "a square": lambda o, y, m: (functional.mse_loss(o, y, reduction="none").mean(1) * m).mean(),
    "an assigned target": lambda o, y, m: functional.smooth_l1_loss(o, y),
    "a power": lambda o, y, m: ((o - y).pow(4) * m[:, None]).sum(),
    "a clamp": lambda o, y, m: (o.clamp(min=y) - m[:, None]).square().mean(),
    "by hand": lambda o, y, m: -(m[:, None] * torch.log(o) * y.abs()).mean(),
    "a Hessian": lambda o, y, m: torch.log1p((o * y).sum(1).square() * m).mean(),
}


@pytest.mark.parametrize("name", OBSERVED)
def test_constants_of_a_loss(name: str) -> None:
    def loss(opt: KFAC, model: nn.Module, x: Tensor, y: Tensor, mask: Tensor) -> Tensor:
        return opt.observe(OBSERVED[name](model(x), y, mask))

    found, expected = (trained(None, loss, changes=own) for own in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_large_targets_are_refused() -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Linear(3, LARGEST_COPY // 8), nn.MSELoss()
    opt, target = KFAC(model, loss_fn), torch.zeros(9, LARGEST_COPY // 8)
    loss_fn(model(torch.randn(9, 3)), target).backward()
    target.fill_(1)
    with pytest.raises(RuntimeError, match=r"a target of the loss.*`\.clone\(\)`"):
        opt.step()


def test_a_model_that_overwrites_its_input_is_refused() -> None:
    model, loss_fn = nn.Sequential(nn.Tanh(), nn.Linear(5, 3)).double(), nn.MSELoss()
    model[0].forward = torch.tanh_  # type: ignore[method-assign]
    opt = KFAC(model, loss_fn)
    loss_fn(model(X.clone()), Y).backward()
    with pytest.raises(RuntimeError, match="The model itself overwrote it"):
        opt.step()


def test_a_change_between_loss_and_backward_pass_is_refused() -> None:
    model, loss_fn, target = net(), nn.PoissonNLLLoss(), Y.clone()
    opt = KFAC(model, loss_fn)
    loss = loss_fn(model(X), target)
    target.fill_(1)

    def step() -> None:
        loss.backward()
        opt.step()

    with pytest.raises(RuntimeError, match=r"in.?place"):
        step()

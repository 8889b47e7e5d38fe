"""The weight of factors where not every loss of a step depends on every layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss

from einconv_kfac import KFAC, kronecker_factors

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [
    {},
    {"inverse": "ekfac"},
    {"lr": 0.1, "adaptive": False},
    {"lr": 0.1, "adaptive": False, "inverse": "ekfac"},
]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(48, 6, generator=GENERATOR, dtype=torch.float64)
SCORES = X @ torch.randn(6, 3, generator=GENERATOR, dtype=torch.float64)
Y, VALUES = SCORES.argmax(1), SCORES.sin()


class TwoHeads(nn.Module):
    """A network that returns scores and values."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh())
        self.scores, self.values = nn.Linear(8, 3), nn.Linear(8, 3)
        self.double()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.trunk(x)
        return self.scores(hidden), self.values(hidden)


class Experts(nn.Module):
    """A network that sends a batch to one of two experts."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(6, 3), nn.Linear(6, 3)])
        self.double()

    def forward(self, x: Tensor, expert: int = 0) -> Tensor:
        scores: Tensor = self.experts[expert](x)
        return scores


def one_loss(model: nn.Module, opt: KFAC) -> None:
    scores, values = model(X)
    opt.observe(cross_entropy(scores, Y) + 0.3 * mse_loss(values, VALUES)).backward()


def two_backward_passes(model: nn.Module, opt: KFAC) -> None:
    scores, values = model(X)
    opt.observe(cross_entropy(scores, Y)).backward(retain_graph=True)
    opt.observe(0.3 * mse_loss(values, VALUES)).backward()


def two_losses(model: nn.Module, opt: KFAC) -> None:
    scores, values = model(X)
    first = opt.observe(cross_entropy(scores, Y))
    second = opt.observe(0.3 * mse_loss(values, VALUES))
    (first + second).backward()


def two_forward_passes(model: nn.Module, opt: KFAC) -> None:
    opt.observe(cross_entropy(model(X)[0], Y)).backward()
    opt.observe(0.3 * mse_loss(model(X)[1], VALUES)).backward()


def trained(backward: Callable[[nn.Module, KFAC], None], options: dict[str, Any]) -> Tensor:
    model = TwoHeads()
    opt = KFAC(model, fisher="exact", **options)
    for _ in range(3):
        opt.zero_grad()
        backward(model, opt)
        opt.step()
    return weights(model)


@cache
def together(mode: str) -> Tensor:
    """What `trained` returns for the sum of the losses in a mode."""
    return trained(one_loss, next(options for options in MODES if str(options) == mode))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("backward", [two_backward_passes, two_losses, two_forward_passes])
def test_losses_of_single_heads_are_their_sum(
    backward: Callable[[nn.Module, KFAC], None], options: dict[str, Any]
) -> None:
    torch.testing.assert_close(trained(backward, options), together(str(options)), **EXACT)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_an_expert_of_one_micro_batch_has_the_factors_of_its_part(reduction: str) -> None:
    """Its factors are of the weighted sum of the losses that depend on it."""
    model, loss_fn = Experts(), nn.CrossEntropyLoss(reduction=reduction)
    opt = KFAC(model, loss_fn, 0.1, adaptive=False, fisher="exact")
    parts = [slice(0, 16), slice(16, 32), slice(32, 48)]
    shares = (0.5, 0.3, 0.2)
    for expert, share, part in zip((0, 1, 0), shares, parts):
        (share * loss_fn(model(X[part], expert), Y[part])).backward()
    expected = {}
    for name, batches in {"experts.0": [0, 2], "experts.1": [1]}.items():
        module = model.get_submodule(name)
        data = [[(X[parts[i]], Y[parts[i]])] for i in batches]
        found = [kronecker_factors(module, loss_fn, own, fisher="exact")[""] for own in data]
        size = 16 if reduction == "sum" else 1
        b = sum(size * shares[i] * own.B for i, own in zip(batches, found))
        expected[name] = [sum(own.A for own in found) / len(found), b]
    opt.step()
    layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
    for name, factors in expected.items():
        torch.testing.assert_close(list(layers[name]["factors"]), factors, **EXACT)


def test_a_penalty_has_no_part_in_the_weight() -> None:
    found = []
    for has_penalty in (False, True):
        model = TwoHeads()
        opt = KFAC(model, lr=0.1, adaptive=False, fisher="exact")
        if has_penalty:
            opt.observe(1e-3 * model.scores.weight.square().sum()).backward()
        one_loss(model, opt)
        opt.step()
        layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
        found.append([list(layer["factors"]) for layer in layers.values()])
    torch.testing.assert_close(*found, rtol=0, atol=0)

"""Losses of several calls of the model, written in several ways that train alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(2, 12, 4, generator=GENERATOR, dtype=torch.float64)
Y, Z = torch.randint(3, (2, 12), generator=GENERATOR)
T = torch.randn(12, 3, generator=GENERATOR, dtype=torch.float64)
OWN = torch.arange(12)
CROSS_ENTROPY, MSE = nn.CrossEntropyLoss(), nn.MSELoss()


class Net(nn.Module):
    """A network, and what follows its outputs for two inputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.join: Callable[[Tensor, Tensor], Tensor] = torch.add

    def forward(self, x: Tensor, other: Tensor | None = None) -> Tensor:
        result: Tensor = self.net(x)
        return result if other is None else self.join(result, self.net(other))


Script = Callable[[Net, KFAC], Any]
"""Returns a loss to backpropagate, or backpropagates one itself."""


def both(model: Net) -> tuple[Tensor, Tensor]:
    """The outputs for two inputs, in one call."""
    first, second = model(torch.cat([A, B])).chunk(2)
    return first, second


def one_by_one(model: Net, _: KFAC) -> None:
    CROSS_ENTROPY(model(A), Y).backward()
    (0.5 * CROSS_ENTROPY(model(B), Z)).backward()


def pairs(first: Tensor, second: Tensor) -> Tensor:
    return first @ second.T


def similar(scores: Tensor) -> Tensor:
    loss: Tensor = 0.5 * CROSS_ENTROPY(scores, OWN) + 0.5 * CROSS_ENTROPY(scores.T, OWN)
    return loss


FORMS: dict[str, list[tuple[nn.Module | None, Script]]] = {
    "two losses": [
        (CROSS_ENTROPY, lambda m, _: CROSS_ENTROPY(m(A), Y) + 0.5 * CROSS_ENTROPY(m(B), Z)),
        (
            None,
            lambda m, opt: opt.observe(CROSS_ENTROPY(m(A), Y) + 0.5 * CROSS_ENTROPY(m(B), Z)),
        ),
        (CROSS_ENTROPY, one_by_one),
    ],
    "sum": [
        (CROSS_ENTROPY, lambda m, _: CROSS_ENTROPY(m(A, B), Y)),
        (CROSS_ENTROPY, lambda m, _: CROSS_ENTROPY(m(A) + m(B), Y)),
        (None, lambda m, opt: opt.observe(CROSS_ENTROPY(m(A) + m(B), Y))),
        (None, lambda m, opt: opt.observe(CROSS_ENTROPY(torch.add(*both(m)), Y))),
    ],
    "pairs": [
        (CROSS_ENTROPY, lambda m, _: similar(pairs(m(A), m(B)))),
        (None, lambda m, opt: opt.observe(similar(pairs(m(A), m(B))))),
        (None, lambda m, opt: opt.observe(similar(pairs(*both(m))))),
    ],
    "consistency": [
        (MSE, lambda m, _: MSE(m(A), T) + MSE(m(A), m(B))),
        (None, lambda m, opt: opt.observe(MSE(m(A), T) + MSE(m(A), m(B)))),
    ],
}
MODES: list[dict[str, Any]] = [{}, {"adaptive": False, "lr": 0.05}]


@cache
def trained(name: str, number: int, mode: int) -> tuple[Tensor, list[float]]:
    """The weights after some steps, and the losses."""
    loss_fn, script = FORMS[name][number]
    model, losses = Net(), []
    opt = KFAC(model, loss_fn, fisher="exact", **MODES[mode])
    for _ in range(3):
        opt.zero_grad()
        loss = script(model, opt)
        if loss is not None:
            loss.backward()
            losses.append(float(loss.detach()))
        opt.step()
    return weights(model), losses


@pytest.mark.parametrize("mode", range(len(MODES)))
@pytest.mark.parametrize(
    ("name", "number"), [(name, i) for name, own in FORMS.items() for i in range(1, len(own))]
)
def test_ways_to_write_a_loss_of_two_calls(name: str, number: int, mode: int) -> None:
    (want, before), (found, losses) = trained(name, 0, mode), trained(name, number, mode)
    torch.testing.assert_close(found, want, rtol=1e-8, atol=1e-10)
    assert before[-1] < before[0]
    assert not losses or losses == pytest.approx(before, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_parts_that_are_called_later_are_refused_and_the_remedy_works(
    options: dict[str, Any],
) -> None:
    """Their calls are watched from the first step on, or not at all."""
    ends = []
    for is_called in (False, True):
        model = Net()
        opt = KFAC(model, fisher="exact", **options)
        if is_called:
            model.net[0](A)
        for call in (model, model, lambda x, own=model.net: own[2](own[1](own[0](x)))):
            opt.zero_grad()
            opt.observe(CROSS_ENTROPY(call(A), Y)).backward()
            if call is not model and not is_called:
                with pytest.raises(RuntimeError, match=r"after the first step only: call each"):
                    opt.step()
                call = model  # noqa: PLW2901
                opt.zero_grad()
                opt.observe(CROSS_ENTROPY(call(A), Y)).backward()
            opt.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-11)

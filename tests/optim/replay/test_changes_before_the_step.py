"""What changes between the backward pass and the step, and what such a step is refused for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

from einconv_kfac import KFAC

X = torch.randn(24, 5, generator=Generator().manual_seed(0), dtype=torch.float64)
Y = torch.randint(3, (24,), generator=Generator().manual_seed(1))
FIXED: dict[str, Any] = {"adaptive": False, "lr": 0.1}


def net(rate: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 6), nn.Dropout(rate), nn.Tanh(), nn.Linear(6, 3), nn.Dropout(rate)
    ).double()


def trained(
    change: Callable[[nn.Sequential], None], rate: float = 0.2, **options: Any
) -> tuple[nn.Sequential, Tensor]:
    """Return a model after four steps, with something changed before each, and its weights."""
    model, loss_fn = net(rate), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for index in range(4):
        torch.manual_seed(index)
        model.train()
        model[1].p = model[4].p = rate  # type: ignore[assignment]
        opt.zero_grad()
        loss_fn(model(X), Y).backward()
        change(model)
        opt.step()
    return model, weights(model)


def set_rates(model: nn.Sequential) -> None:
    model[1].p = model[4].p = 0.9  # type: ignore[assignment]


@pytest.mark.parametrize("options", [{}, {"safeguard": True}, {"curvature_fraction": 0.5}, FIXED])
def test_rates_of_dropout_count_as_they_were_in_the_pass(options: dict[str, Any]) -> None:
    model, found = trained(set_rates, **options)
    assert torch.equal(found, trained(lambda _: None, **options)[1])
    assert model[1].p == model[4].p == 0.9


@pytest.mark.parametrize("options", [{}, {"curvature_fraction": 0.5}, FIXED])
def test_training_mode_counts_as_it_was_in_the_pass(options: dict[str, Any]) -> None:
    def change(model: nn.Sequential) -> None:
        model[1].eval()
        model[4].eval()

    found = trained(change, **options)[1]
    assert torch.equal(found, trained(lambda _: None, **options)[1])


def clamp_data(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.2, 0.2)


@torch.no_grad()
def clamp(model: nn.Sequential) -> None:
    for parameter in model.parameters():
        parameter.clamp_(-0.2, 0.2)


def test_parameters_changed_through_data_are_refused_with_a_remedy() -> None:
    words = r"parameters after it or inside of `torch\.no_grad\(\)` \(not through `\.data`\)"
    with pytest.raises(RuntimeError, match=words):
        trained(clamp_data, rate=0.0)
    assert trained(clamp, rate=0.0)[1].isfinite().all()


@pytest.mark.parametrize("kind", ["weights", "proxies"])
def test_parameters_of_the_loss_may_be_trained_first(kind: str) -> None:
    """Weights of losses, or proxies of classes, by another optimizer that steps first or last."""
    ends = []
    for is_first in (False, True):
        model = net(0.0)
        shares = torch.ones(2, dtype=X.dtype, requires_grad=True)
        proxies = torch.eye(3, dtype=X.dtype).requires_grad_()
        opt, other = KFAC(model, fisher="exact"), torch.optim.SGD([shares, proxies], 0.1)
        for _ in range(3):
            opt.zero_grad()
            other.zero_grad()
            scores = model(X) @ proxies.T if kind == "proxies" else model(X)
            losses = cross_entropy(scores, Y), scores.square().mean()
            own = shares if kind == "weights" else shares.detach().clone()
            opt.observe(own[0] * losses[0] + own[1] * losses[1]).backward()
            for each in (other, opt) if is_first else (opt, other):
                each.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-12)

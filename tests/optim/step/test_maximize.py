"""``maximize=True``: the same as minimising the negated objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC


class LogLikelihood(nn.Module):
    """The mean log-likelihood of classes, which is concave in the output."""

    reduction = "mean"
    sign = 1.0

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        return self.sign * -nn.functional.cross_entropy(output, target)


class NegatedLogLikelihood(LogLikelihood):
    """What is minimised instead."""

    sign = -1.0


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.1, "adaptive": False, "weight_decay": 0.1},
        {"lr": 0.1, "adaptive": False, "weight_decay": 0.1, "decoupled_weight_decay": True},
        {"lr": 0.1, "adaptive": False, "fallback": "adam", "nesterov": True},
    ],
)
def test_maximising_is_minimising_the_negated_objective(options: dict[str, Any]) -> None:
    found = []
    for maximize, loss_fn in ((True, LogLikelihood()), (False, NegatedLogLikelihood())):
        model = conv_net(random_layers=True)
        opt = KFAC(model, loss_fn, maximize=maximize, fisher="empirical", **options)
        torch.manual_seed(0)
        losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(6)]
        found.append(weights(model))
        assert (losses[-1] > losses[0]) == maximize
    assert torch.allclose(*found, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical"])
def test_the_gradient_of_a_known_loss_is_ascended_with_fixed_rates(fisher: Any) -> None:
    loss_fn = nn.CrossEntropyLoss()
    options: dict[str, Any] = {"adaptive": False, "fisher": fisher, "weight_decay": 0.1}
    model, twin = conv_net(), conv_net()
    opt, other = (
        KFAC(model, loss_fn, 0.1, maximize=True, **options),
        KFAC(twin, loss_fn, 0.1, **options),
    )
    for seed in range(6):
        x, y = image_batch(seed=seed)
        train_step(model, loss_fn, opt, (x, y))
        other.zero_grad()
        (-loss_fn(twin(x), y)).backward()
        other.step()
    assert torch.allclose(weights(model), weights(twin), rtol=1e-12, atol=1e-14)


def test_weight_decay_is_that_of_torch() -> None:
    """Without curvature the step is that of torch's SGD."""
    loss_fn = nn.CrossEntropyLoss()
    model, twin = conv_net(), conv_net()
    options: dict[str, Any] = {"adaptive": False, "kl_clip": None, "momentum": 0.9}
    opt = KFAC(model, loss_fn, 0.1, maximize=True, weight_decay=0.1, exclude="*", **options)
    sgd = torch.optim.SGD(twin.parameters(), 0.1, 0.9, weight_decay=0.1, maximize=True)
    for seed in range(4):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        train_step(twin, loss_fn, sgd, image_batch(seed=seed))
    assert torch.allclose(weights(model), weights(twin), rtol=1e-12, atol=1e-14)


def test_a_convex_loss_has_no_maximum() -> None:
    with pytest.raises(ValueError, match="`maximize` must be False when adaptive=True"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), maximize=True)
    KFAC(conv_net(), nn.CrossEntropyLoss(), 0.1, maximize=True, adaptive=False)

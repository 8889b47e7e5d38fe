"""Steps and factors inside of a block of inference mode."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors

MODES: list[dict[str, Any]] = [
    {},
    {"safeguard": True, "weight_decay": 0.1},
    {"inverse": "exact", "damping": 0.1, "momentum": 0.5},
    {"inverse": "ekfac", "factor_update_period": 1, "inverse_update_period": 1},
    {"fisher": "empirical", "curvature_fraction": 0.5},
    {"adaptive": False, "lr": 0.05, "momentum": 0.9},
    {"adaptive": False, "lr": 0.05, "fallback": "adam", "inverse": "ekfac"},
]
STEPS = 4


def is_inside(when: str, number: int) -> bool:
    """Whether a step is taken in inference mode."""
    return {"never": False, "always": True, "in turns": number % 2 == 0}[when]


def trained(make: Any, options: dict[str, Any], when: str) -> Tensor:
    """Return the weights after some steps."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = make(model, loss_fn, **options)
    sgd = torch.optim.SGD(model.parameters(), 0.05) if make is KFACPreconditioner else None
    for number in range(STEPS):
        x, y = image_batch(seed=number)
        model.zero_grad()
        loss_fn(model(x), y).backward()
        with torch.inference_mode(is_inside(when, number)):
            opt.step()
            assert torch.is_inference_mode_enabled() == is_inside(when, number)
        if sgd is not None:
            sgd.step()
    return weights(model)


@cache
def outside(**options: Any) -> Tensor:
    """The weights after steps outside of inference mode."""
    return trained(KFAC, options, "never")


@pytest.mark.parametrize("when", ["always", "in turns"])
@pytest.mark.parametrize("options", MODES)
def test_a_step_inside_is_that_outside(options: dict[str, Any], when: str) -> None:
    assert torch.equal(trained(KFAC, options, when), outside(**options))


@pytest.mark.parametrize("when", ["always", "in turns"])
@pytest.mark.parametrize("options", [{}, {"inverse": "ekfac"}])
def test_a_step_of_a_preconditioner_inside_is_that_outside(
    options: dict[str, Any], when: str
) -> None:
    own = KFACPreconditioner, options
    assert torch.equal(trained(*own, when), trained(*own, "never"))


def trained_by_closures(options: dict[str, Any], *, is_inside: bool) -> Tensor:
    """Return the weights after some steps that are given closures."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)

    def closure() -> Tensor:
        opt.zero_grad()
        x, y = image_batch()
        loss: Tensor = loss_fn(model(x), y)
        loss.backward()
        return loss

    for _ in range(3):
        with torch.inference_mode(is_inside):
            opt.step(closure)
    return weights(model)


@pytest.mark.parametrize("options", MODES)
def test_a_closure_of_a_step_inside_has_gradients(options: dict[str, Any]) -> None:
    outside = trained_by_closures(options, is_inside=False)
    assert torch.equal(trained_by_closures(options, is_inside=True), outside)


@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward-only", "mc"])
def test_factors_inside_are_those_outside(fisher: Any) -> None:
    model, loss_fn, data = conv_net(), nn.CrossEntropyLoss(), [image_batch()]
    outside = kronecker_factors(model, loss_fn, data, fisher=fisher)
    with torch.inference_mode():
        inside = kronecker_factors(model, loss_fn, data, fisher=fisher)
    for name, factors in outside.items():
        assert torch.equal(inside[name].to_dense(), factors.to_dense())
    loss_fn(model(data[0][0]), data[0][1]).backward()  # the model is an ordinary one

"""KFAC with fixed rates: the variants of the step, against torch's own optimizers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import nn
from torch.optim import SGD, AdamW

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-9, "atol": 1e-11}
LAYERS = ["0", "2", "5"]


def same_steps(options: dict[str, Any], reference: Any, steps: int = 6) -> None:
    """Compare training without a preconditioned layer with training by torch's optimizer."""
    model, other, loss_fn = conv_net(), conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, adaptive=False, exclude=LAYERS, **options)
    other_opt = reference(other.parameters())
    for seed in range(steps):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        train_step(other, loss_fn, other_opt, image_batch(seed=seed))
    torch.testing.assert_close(weights(model), weights(other), **EXACT)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_sgd(nesterov: bool, decay: float) -> None:
    shared = {"lr": 0.05, "momentum": 0.8, "nesterov": nesterov, "weight_decay": decay}
    same_steps({**shared, "fallback": "gradient"}, lambda p: SGD(p, **shared))


@pytest.mark.parametrize("nesterov", [False, True])
def test_decoupled_weight_decay_is_that_of_adamw(nesterov: bool) -> None:
    options = {"fallback": "adam", "decoupled_weight_decay": True, "nesterov": nesterov}
    shared = {"lr": 0.01, "weight_decay": 0.3}
    same_steps({**options, **shared}, lambda p: AdamW(p, **shared))


def test_decoupled_weight_decay_leaves_gradient_and_curvature_alone() -> None:
    options: dict[str, Any] = {"lr": 0.1, "adaptive": False, "fisher": "exact", "momentum": 0.0}
    start = weights(conv_net())
    found = []
    for decay in (0.0, 0.2):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, weight_decay=decay, decoupled_weight_decay=True, **options)
        train_step(model, loss_fn, opt, image_batch())
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0] - 0.1 * 0.2 * start, **EXACT)


def test_nesterov_adds_the_velocity_to_come() -> None:
    """From the heavy-ball run's positions: ``step = d + m v`` with ``v = m v + d``."""
    options: dict[str, Any] = {"adaptive": False, "fisher": "exact", "kl_clip": None}
    plain, fast = conv_net(), conv_net()
    start, moved = weights(plain), []
    for model, nesterov in ((plain, False), (fast, True)):
        loss_fn = nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, lr=0.1, momentum=0.5, nesterov=nesterov, **options)
        train_step(model, loss_fn, opt, image_batch())
        moved.append(weights(model) - start)
    torch.testing.assert_close(moved[1], 1.5 * moved[0], **EXACT)


@pytest.mark.parametrize("bound", [1e-3, 1e3])
def test_the_norm_constraint_bounds_the_step(bound: float) -> None:
    options: dict[str, Any] = {"adaptive": False, "fisher": "exact", "kl_clip": None}
    start, moved = weights(conv_net()), []
    for constraint in (None, lambda _: bound):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, lr=0.2, momentum=0.0, max_step_norm=constraint, **options)
        train_step(model, loss_fn, opt, image_batch())
        moved.append(weights(model) - start)
    factor = min(1.0, bound / float(moved[0].norm()))
    torch.testing.assert_close(moved[1], factor * moved[0], **EXACT)
    assert opt.statistics()["clip"] == pytest.approx(factor)


@pytest.mark.parametrize("option", [{"nesterov": True}, {"max_step_norm": 1.0}])
def test_the_automatic_step_refuses_them(option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(ValueError, match=f"`{name}` must not be set when adaptive=True"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), **option)

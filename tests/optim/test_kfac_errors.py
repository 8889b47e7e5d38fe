"""KFAC: what it refuses, and in which words."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, weights
from torch import nn

from einconv_kfac import KFAC

BAD_ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"lr": -0.1}, r"`lr` must be a number in \[0, 1e\+18\), got -0.1"),
    ({"lr": float("nan")}, r"`lr` must be a number in \[0, 1e\+18\), got nan"),
    ({"weight_decay": -1.0}, "`weight_decay` must be a number"),
    ({"momentum": 1.0}, r"`momentum` must be a number in \[0, 1.0\), got 1.0"),
    ({"momentum": -0.5}, "`momentum` must be a number"),
    ({"damping": 0.0}, r"`damping` must be a number in \[1e-30, 1e\+18\), got 0.0"),
    ({"damping": float("nan")}, "`damping` must be a number"),
    ({"factor_decay": 1.0}, r"`factor_decay` must be a number in \[0, 1.0\), got 1.0"),
    ({"factor_update_period": 0}, "`factor_update_period` must be a positive integer, got 0"),
    ({"inverse_update_period": 1.5}, "`inverse_update_period` must be a positive integer"),
    ({"kl_clip": -1e-3}, "`kl_clip` must be a number"),
    ({"fisher": "true"}, "`fisher` must be one of .*'mc'.*, got 'true'"),
    ({"approximation": "kfc"}, "`approximation` must be one of .*'expand'.*, got 'kfc'"),
    ({"mc_samples": 0}, "`mc_samples` must be at least 1, got 0"),
    ({"mc_samples": 2, "fisher": "exact"}, "`mc_samples` must be 1 for fisher='exact'.*got 2"),
    (
        {"params": [nn.Parameter(torch.zeros(2))]},
        r"`params` must be parameters of `model`, got another one of shape \[2\].* by another",
    ),
    ({"params": []}, "optimizer got an empty parameter list"),
]


FIXED = {"lr": 0.1, "adaptive": False}
WRONG_MODE: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    ({"kl_clip": 1e-3}, "`kl_clip` must not be set when adaptive=True, got 0.001", FIXED),
    ({"max_step_norm": 1.0}, "`max_step_norm` must not be set when adaptive=True", FIXED),
    ({"nesterov": True}, "`nesterov` must not be set when adaptive=True, got True", FIXED),
    ({**FIXED, "curvature_fraction": 0.5}, "`curvature_fraction` must be 1 when.*got 0.5", {}),
    ({**FIXED, "safeguard": True}, "`safeguard` must be False where adaptive=False", {}),
    ({"adaptive": False}, "`lr` must be given when adaptive=False, got None", {"lr": 0.1}),
]


@pytest.mark.parametrize(("options", "message", "remedy"), WRONG_MODE)
def test_arguments_of_the_other_mode_are_refused_and_the_remedy_works(
    options: dict[str, Any], message: str, remedy: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(conv_net(), nn.CrossEntropyLoss(), **options)
    if remedy:
        accepted = {**options, **remedy}
    else:
        accepted = {name: value for name, value in options.items() if name not in FIXED}
    KFAC(conv_net(), nn.CrossEntropyLoss(), **accepted)


def test_no_bound_is_accepted_in_both_modes() -> None:
    for mode in ({}, FIXED):
        KFAC(conv_net(), nn.CrossEntropyLoss(), kl_clip=None, max_step_norm=None, **mode)


@pytest.mark.parametrize(("options", "message"), BAD_ARGUMENTS)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KFAC(conv_net(), nn.CrossEntropyLoss(), **options)


def test_refused_arguments_leave_no_hooks() -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="strict"):
        KFAC(model, loss_fn, strict=True)
    assert not any(m._forward_hooks for m in [*model.modules(), loss_fn])


def test_strict_names_the_layers_without_factors() -> None:
    message = r"got none for '6.weight' \(PReLU\)"
    with pytest.raises(ValueError, match=message):
        KFAC(conv_net(random_layers=True), nn.CrossEntropyLoss(), strict=True)
    KFAC(conv_net(), nn.CrossEntropyLoss(), strict=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "saw none whose gradient is in `.grad`.*optimizer.observe"),
        (
            {"lr": 0.1, "adaptive": False},
            "saw none whose gradient is in `.grad`.*optimizer.observe",
        ),
    ],
)
def test_a_step_whose_loss_was_never_seen(options: dict[str, Any], message: str) -> None:
    model = conv_net()
    opt = KFAC(model, nn.CrossEntropyLoss(), **options)
    x, y = image_batch()
    nn.functional.cross_entropy(model(x), y).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=message):
        opt.step()
    assert torch.equal(before, weights(model))


def test_a_bad_group_is_not_added() -> None:
    model = conv_net()
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, params=model[0].parameters())
    with pytest.raises(ValueError, match="`lr` must be a number"):
        opt.add_param_group({"params": model[2].parameters(), "lr": -1.0})
    assert len(opt.param_groups) == 1
    opt.param_groups[0]["lr"] = float("nan")
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    with pytest.raises(ValueError, match="`lr` must be a number"):
        opt.step()
    opt.param_groups[0]["lr"] = 1.0
    opt.step()  # what the first try needed is still there

"""Inverses of wide layers in steps with few examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inverse_cases import layer_states
from optim_cases import train_step
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature.blocks import cholesky
from einconv_kfac.curvature.blocks.low_rank import LowRank, RankBound

WIDE, STEPS = 300, 3


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDE, 260), nn.Tanh(), nn.Linear(260, 3)).double()


def batch(seed: int, size: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, WIDE, generator=generator).double()
    return x, (x[:, 0] > 0).long()


def trained(**settings: Any) -> KFAC:
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **settings)
    for step in range(STEPS):
        train_step(model, loss_fn, opt, batch(step))
    return opt


@pytest.mark.parametrize(
    ("settings", "low"),
    [
        ({}, {301, 261, 260}),
        ({"fisher": "empirical", "approximation": "reduce"}, {301, 261, 260}),
        ({"mc_samples": 2}, {301, 261, 260}),
        ({"mc_samples": 6}, {301, 261}),
        ({"fisher": "exact"}, {301, 261}),
        ({"adaptive": False, "lr": 0.1, "factor_fraction": 0.5}, {301, 261, 260}),
    ],
)
def test_inverses_are_those_of_the_factors(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], low: set[int]
) -> None:
    found, kept = set(), RankBound.form

    def form(bound: RankBound, factor: Tensor) -> LowRank | None:
        if (own := kept(bound, factor)) is not None:
            found.add(factor.shape[-1])
        return own

    monkeypatch.setattr(RankBound, "form", form)
    opt = trained(**settings)
    assert found == low
    for own in layer_states(opt).values():
        parts = cholesky.split_damping(own["factors"], own["inverse"]["damping"])
        for factor, part, inverse in zip(own["factors"], parts, (own["inverse"][n] for n in "ab")):
            expected = torch.linalg.inv(factor + part * torch.eye(factor.shape[-1]))
            torch.testing.assert_close(inverse, expected, rtol=1e-6, atol=1e-8 / part.item())


@pytest.mark.parametrize("settings", [{}, {"adaptive": False, "lr": 0.1}])
def test_training_is_that_with_decompositions(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    own = [
        p.detach().clone() for group in trained(**settings).param_groups for p in group["params"]
    ]
    monkeypatch.setattr(RankBound, "form", lambda *_: None)
    others = [p for group in trained(**settings).param_groups for p in group["params"]]
    for parameter, other in zip(own, others):
        torch.testing.assert_close(parameter, other, rtol=1e-6, atol=1e-9)

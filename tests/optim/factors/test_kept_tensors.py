"""Factors and inverses are kept no longer than they are used."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC


def present(opt: KFAC) -> list[Tensor]:
    """The input factors of all layers, and their inverses."""
    found: list[Tensor] = []
    for own in opt._preconditioner.layers.values():
        assert own.factors is not None
        assert own.inverse is not None
        found += [own.factors[0], own.inverse.a]  # type: ignore[attr-defined]
    return found


OPTIONS: list[dict[str, Any]] = [
    *({}, {"damping": 0.1}, {"adaptive": False, "lr": 0.1}),
    {"adaptive": False, "lr": 0.1, "factor_update_period": 1, "inverse_update_period": 100},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_steps_keep_the_present_factors_and_inverses_alone(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, loss_fn = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), nn.MSELoss()
    opt, known = KFAC(model, loss_fn, **options), list[weakref.ref[Tensor]]()
    for _ in range(30):
        opt.zero_grad()
        loss_fn(model(torch.randn(16, 4)), torch.randn(16, 3)).backward()
        opt.step()
        known += [weakref.ref(own) for own in present(opt)]
        alive = {id(own) for ref in known if (own := ref()) is not None}
        assert alive == {id(own) for own in present(opt)}
    assert len({id(ref) for ref in known}) > 8

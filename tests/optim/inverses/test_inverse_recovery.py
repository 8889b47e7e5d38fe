"""Damped factors that are not positive definite: float64, more damping, or an error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from inverse_cases import dampings, layer_states
from optim_cases import train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.curvature import find_layers
from einconv_kfac.optim.factors import averages
from einconv_kfac.optim.inverses.protocol import Task
from einconv_kfac.optim.inverses.registry import kinds

INDEFINITE = torch.tensor([[1.0, 2.0], [2.0, 1.0]])  # eigenvalues 3 and -1


class TestRecovery:
    @pytest.fixture(autouse=True)
    def _spoiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Scale the factor ``B`` of layer ``2`` to an indefinite one, if there is a scale."""
        self.scale = 0.0
        averaged = averages.averaged

        def spoiled(several: Any) -> list[tuple[Tensor, Tensor]]:
            return [
                (a, self.scale * INDEFINITE[None] if self.scale and own.layer.name == "2" else b)
                for own, (a, b) in zip(several, averaged(several))
            ]

        monkeypatch.setattr(averages, "averaged", spoiled)

    def trained(self, **options: Any) -> tuple[nn.Module, KFAC]:
        """Return a model of two layers after a step, and its optimizer."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        self.loss_fn = loss_fn = nn.MSELoss()
        opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, factor_decay=0.0, **options)
        self.batch = torch.randn(6, 3), torch.randn(6, 2)
        train_step(model, loss_fn, opt, self.batch)
        return model, opt

    def test_raises_the_damping_of_one_layer(self) -> None:
        model, opt = self.trained(damping=0.1)
        self.scale = 1.0
        with pytest.warns(RuntimeWarning, match="factors of '2' were not positive definite"):
            train_step(model, self.loss_fn, opt, self.batch)
        train_step(model, self.loss_fn, opt, self.batch)  # warns once
        assert dampings(opt)["0"] == 0.1
        assert dampings(opt)["2"] in (1.0, 10.0, 100.0)
        assert opt.statistics()["cholesky_retries"] >= 4
        assert all(p.isfinite().all() for p in model.parameters())

    def test_gives_up_and_changes_nothing(self) -> None:
        model, opt = self.trained(damping=1e-3)
        self.scale = 1e12
        before, inverses = weights(model), [own["inverse"] for own in layer_states(opt).values()]
        with pytest.raises(RuntimeError, match="factor B of '2' must be positive definite"):
            train_step(model, self.loss_fn, opt, self.batch)
        assert torch.equal(before, weights(model))
        for inverse, layer in zip(inverses, layer_states(opt).values()):
            assert inverse["damping"] == layer["inverse"]["damping"]
            assert all(torch.equal(inverse[letter], layer["inverse"][letter]) for letter in "ab")


def test_float64_where_that_is_enough() -> None:
    ones = torch.ones(1, 2, 2)
    (layer,) = find_layers(nn.Linear(1, 2))
    task = Task("", (ones, torch.eye(2)[None]), 1e-16, layer.layout)
    (found,) = kinds()["factored"].timed([task])  # float32: 1 + 1e-8 = 1
    assert found.retries == 1
    assert found.inverse.damping == 1e-16
    expected = torch.linalg.inv(ones.double() + 1e-8 * torch.eye(2).double())
    torch.testing.assert_close(found.inverse.a.double(), expected, rtol=1e-4, atol=0)

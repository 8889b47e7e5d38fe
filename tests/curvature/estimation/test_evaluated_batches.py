"""Batches of other forms than pairs, and models that compute their loss."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def test_inputs_of_other_forms() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            result: Tensor = self.layer(input=left + right)
            return result

    class WithLoss(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model, self.loss = model, nn.MSELoss()

        def forward(self, left: Tensor, right: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = self.loss(self.model(left, right), y)
            return loss

    torch.manual_seed(0)
    model, loss_fn = Added().double(), nn.MSELoss()
    left, right, y = torch.randn(3, 4, 3, dtype=torch.float64).unbind(0)
    y = y[:, :2]
    expected = kronecker_factors(model.layer, loss_fn, [(left + right, y)], fisher="exact")[""]
    whole = WithLoss(model)
    found = [
        kronecker_factors(model, loss_fn, [((left, right), y)], fisher="exact"),
        kronecker_factors(model, loss_fn, [({"left": left, "right": right}, y)], fisher="exact"),
        kronecker_factors(whole, whole.loss, [(left, right, y)], fisher="exact"),
        kronecker_factors(
            model,
            loss_fn,
            [{"x": left, "z": right, "y": y}],
            fisher="exact",
            forward=lambda model, b: (model(b["x"], b["z"]), b["y"]),
        ),
    ]
    for factors in found:
        (block,) = factors.values()
        torch.testing.assert_close(block.A, expected.A, **TOLERANCE)
        torch.testing.assert_close(block.B, expected.B, **TOLERANCE)


def test_a_loss_inside_a_model_must_be_called_once() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.loss = nn.Linear(3, 2), nn.MSELoss()

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            result: Tensor = self.loss(y, y.detach()) + self.loss(y, torch.zeros_like(y))
            return result

    model = Both()
    with pytest.raises(RuntimeError, match="must call `loss_fn` once per batch, got 2 calls"):
        kronecker_factors(model, model.loss, [{"x": torch.ones(4, 3)}])

"""States that a script passes on across a step, though nothing is backpropagated through them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.optim import KFAC


class Memory(nn.Module):
    """A recurrent network that returns its state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.cell(x, state)
        return self.out(y), state


def parameters(*, factor: float, detach: bool, **options: Any) -> list[Tensor]:
    """Train with states of rollouts that go on after a step, and return the parameters."""
    torch.manual_seed(0)
    model = Memory().double()
    opt, state = KFAC(model, fisher="exact", **options), None
    for _ in range(3):
        for _ in range(2):  # a rollout, whose graph is not used
            _, state = model(torch.randn(1, 5, 3).double(), state)
            state = tuple(e.detach() if detach else e for e in state)
            state = state if factor == 1 else tuple(factor * e for e in state)
        start = tuple(e.detach() for e in state)
        opt.zero_grad()
        opt.observe(model(torch.randn(3, 5, 3).double(), start)[0].square().mean()).backward()
        opt.step()
    return [p.detach() for p in model.parameters()]


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
def test_a_rollout_that_goes_on_after_a_step(factor: float, options: dict[str, Any]) -> None:
    got = parameters(factor=factor, detach=False, **options)
    torch.testing.assert_close(got, parameters(factor=factor, detach=True, **options))

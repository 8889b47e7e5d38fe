"""Models that were made, copied or partly run in inference mode."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

MODES: list[dict[str, Any]] = [
    {},
    {"curvature_fraction": 0.5},
    {"adaptive": False, "lr": 0.05},
]


class Headed(nn.Module):
    """A frozen network, and a head that is trained.

    Args:
        made: Whether the frozen part is made in inference mode.
        run: Whether it is run there.
    """

    def __init__(self, *, made: bool = False, run: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        with torch.inference_mode(made):
            parts = nn.Linear(4, 5), nn.LeakyReLU(0.5, inplace=True), nn.BatchNorm1d(5)
            self.frozen = nn.Sequential(*parts).double().eval().requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 2)).double()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(self.run):
            features = self.frozen(x)
        result: Tensor = self.head(features.clone())
        return result


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(16, 4).double(), torch.randint(2, (16,))


def train(model: nn.Module, opt: KFAC, steps: int) -> Tensor:
    """Return the weights after some steps."""
    (x, y), loss_fn = batch(), nn.CrossEntropyLoss()
    for _ in range(steps):
        opt.zero_grad()
        opt.observe(loss_fn(model(x), y)).backward()
        opt.step()
    return weights(model)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("where", ["made", "run"])
def test_a_frozen_part_of_inference_mode_is_as_any(where: str, options: dict[str, Any]) -> None:
    plain, model = Headed(), Headed(**{where: True})
    want = train(plain, KFAC(plain, **options), 4)
    torch.testing.assert_close(train(model, KFAC(model, **options), 4), want, rtol=0, atol=0)


@pytest.mark.parametrize("options", MODES)
def test_a_copy_made_in_inference_mode_is_refused_and_its_states_train(
    options: dict[str, Any],
) -> None:
    model = Headed()
    opt = KFAC(model, **options)
    train(model, opt, 3)
    with torch.inference_mode():
        copied, its_opt = deepcopy((model, opt))
    before = weights(copied)
    with pytest.raises(RuntimeError, match=r"made outside of `torch.inference|Inference tensors"):
        train(copied, its_opt, 1)
    assert torch.equal(weights(copied), before)
    fresh = Headed()
    its_own = KFAC(fresh, **options)
    fresh.load_state_dict(copied.state_dict())
    its_own.load_state_dict(its_opt.state_dict())
    assert torch.equal(train(fresh, its_own, 3), train(model, opt, 3))


def test_a_model_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        model = Headed()
    with pytest.raises(RuntimeError, match=r"made outside of `torch.inference_mode\(\)`"):
        train(model, KFAC(model), 1)

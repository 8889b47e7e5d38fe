"""Models in float16 and bfloat16: state in float32, steps that reduce the loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC

LOSS = nn.CrossEntropyLoss()
LOW = [torch.float16, torch.bfloat16]
FIXED = {"adaptive": False, "lr": 0.02}


class Tokens(nn.Sequential):
    """A model with an embedding and a normalisation, which no Kronecker factor covers."""

    def __init__(self, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Embedding(20, 8), nn.Flatten(), nn.LayerNorm(24), nn.Linear(24, 3))
        self.to(dtype)


def tokens() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    draw = {"generator": generator}
    return torch.randint(10, (32, 3), **draw), torch.randint(3, (32,), **draw)


def train(opt: KFAC, model: nn.Module, steps: int) -> list[float]:
    losses, (x, y) = [], tokens()
    for _ in range(steps):
        opt.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fallback": "gradient"},
        {"momentum": 0.5},
        {"damping": 0.1},
        {"inverse": "ekfac", "safeguard": True},
        {"exclude": "*"},
        {**FIXED},
        {**FIXED, "fallback": "adam"},
        {**FIXED, "fallback": "adam", "exclude": "*"},
        {**FIXED, "nesterov": True, "weight_decay": 0.01, "decoupled_weight_decay": True},
    ],
)
def test_the_loss_falls(options: dict[str, Any], dtype: torch.dtype) -> None:
    model = Tokens(dtype)
    steps = 12 if "lr" in options else 8
    losses = train(KFAC(model, LOSS, **options), model, steps)
    assert all(bool(p.isfinite().all()) and p.dtype == dtype for p in model.parameters())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("dtype", LOW)
def test_adam_is_that_of_float32(dtype: torch.dtype) -> None:
    """Gradients of 1e-5 have squares that underflow in float16."""
    model = nn.Sequential(nn.Linear(3, 2)).to(dtype)
    opt = KFAC(model, LOSS, adaptive=False, lr=0.1, fallback="adam", exclude="*", momentum=0.0)
    copies = [p.detach().float().clone() for p in model.parameters()]
    reference = torch.optim.Adam(copies, lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        for parameter, copy in zip(model.parameters(), copies):
            gradient = 1e-5 * torch.randn(parameter.shape, generator=generator)
            parameter.grad = gradient.to(dtype)
            copy.grad = parameter.grad.float()
        opt.step()
        reference.step()
    for parameter, copy in zip(model.parameters(), copies):
        torch.testing.assert_close(parameter.float(), copy, rtol=0.02, atol=0.01)
        assert opt.state[parameter]["exp_avg_sq"].dtype == torch.float32
        torch.testing.assert_close(
            opt.state[parameter]["exp_avg_sq"], reference.state[copy]["exp_avg_sq"]
        )


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("options", [{}, {**FIXED, "fallback": "adam"}])
def test_a_saved_state_keeps_its_precision(dtype: torch.dtype, options: dict[str, Any]) -> None:
    model, other = Tokens(dtype), Tokens(dtype)
    opt = KFAC(model, LOSS, **options)
    train(opt, model, 4)
    other.load_state_dict(model.state_dict())
    loaded = KFAC(other, LOSS, **options)
    loaded.load_state_dict(opt.state_dict())
    for parameter, copy in zip(model.parameters(), other.parameters()):
        for name, value in opt.state[parameter].items():
            found = loaded.state[copy][name]
            if isinstance(value, Tensor):
                assert value.dtype == found.dtype == torch.float32
                assert torch.equal(value, found)
            else:
                assert value == found
    assert train(opt, model, 3) == train(loaded, other, 3)

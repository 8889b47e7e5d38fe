"""Activations in place between a model's output and the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

Activation = Callable[[Tensor], Tensor]
FIXED: dict[str, Any] = {"adaptive": False, "lr": 0.1}


def trained(activation: Activation, steps: int = 3, **options: Any) -> Tensor:
    """Train a generator by a discriminator with an activation."""
    torch.manual_seed(0)
    x = torch.randn(8, 4, dtype=torch.float64)
    generator = nn.Linear(4, 5).double()
    hidden = nn.Linear(5, 6).double().requires_grad_(False)
    score = nn.Linear(6, 1).double().requires_grad_(False)
    opt = KFAC(generator, fisher="exact", **options)
    for _ in range(steps):
        opt.zero_grad()
        scores = score(activation(hidden(generator(x))))
        loss = functional.binary_cross_entropy_with_logits(scores, torch.ones_like(scores))
        opt.observe(loss).backward()
        opt.step()
    return generator.weight.detach()


@pytest.mark.parametrize("options", [{}, FIXED])
@pytest.mark.parametrize("kind", [nn.LeakyReLU, nn.SiLU, nn.Mish, nn.ReLU6, nn.Hardswish])
def test_in_place_is_as_out_of_place(kind: Any, options: dict[str, Any]) -> None:
    torch.testing.assert_close(
        trained(kind(inplace=True), **options), trained(kind(), **options), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        (nn.ELU(inplace=True), "must be known when adaptive=True, got Elu"),
        (nn.LeakyReLU(0.0, inplace=True), "must be known when adaptive=True, got LeakyRelu"),
        (nn.Hardsigmoid(), "must be differentiable twice, got one that is not: .*hardsigmoid"),
    ],
)
def test_others_are_refused(activation: Activation, words: str) -> None:
    with pytest.raises(RuntimeError, match=words):
        trained(activation, 1)


def test_fixed_rates_need_no_input() -> None:
    assert trained(nn.ELU(inplace=True), **FIXED).isfinite().all()

"""Embeddings with a padding whose row has a gradient elsewhere: slopes are those of ``.grad``."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.optim.replay.bags import native_embeddings
from einconv_kfac.optim.replay.substitution import substituted


class Tied(nn.Module):
    """A language model with one weight for inputs and outputs."""

    def __init__(self, is_tied: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = nn.Embedding(7, 5, padding_idx=0)
        self.hidden = nn.Linear(5, 5)
        self.scores = nn.Linear(5, 7, bias=False)
        if is_tied:
            self.scores.weight = self.rows.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.scores(self.hidden(self.rows(x)).tanh())
        return output


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(7, (2, 20, 4), generator=generator)
    return x, y.flatten()


def test_the_tangent_is_the_adjoint_of_the_backward_pass() -> None:
    model, (x, _) = Tied(), batch()
    x[:, 0] = 0
    torch.manual_seed(2)
    tangents = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    v = torch.randn(20, 4, 7, dtype=torch.float64)
    gradients = torch.autograd.grad((model(x) * v).sum(), [*model.parameters()])
    slope = sum((g * tangents[n]).sum() for (n, _), g in zip(model.named_parameters(), gradients))
    with forward_ad.dual_level(), substituted(native_embeddings([*model.modules()])):
        duals = {
            name: forward_ad.make_dual(p.detach(), tangents[name])
            for name, p in model.named_parameters()
        }
        output = torch.func.functional_call(model, duals, (x,))
        value, found = forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
        torch.testing.assert_close((found * v).sum(), slope)
        assert torch.equal(value, model(x))


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.01}])
@pytest.mark.parametrize("is_tied", [False, True])
def test_the_slope_is_explained(is_tied: bool, options: dict[str, Any]) -> None:
    model, (x, y) = Tied(is_tied), batch()
    opt = KFAC(model, fisher="exact", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(6):
            opt.zero_grad()
            opt.observe(functional.cross_entropy(model(x).flatten(0, 1), y)).backward()
            opt.step()

"""Losses that are linear in log-probabilities of a model have the curvature of cross entropy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from ggn import dense_ggn
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "nll_loss": functional.nll_loss,
    "gather": lambda out, y: -out.gather(1, y[:, None]).mean(),
    "index": lambda out, y: -out[torch.arange(len(y)), y].mean(),
    "one-hot": lambda out, y: -(functional.one_hot(y, 3) * out).sum(1).mean(),
    "parts": lambda out, y: (
        functional.nll_loss(out[:2], y[:2], reduction="sum") / 12
        + functional.nll_loss(out[2:], y[2:], reduction="sum") / 12
    ),
    "kl_div": lambda out, y: functional.kl_div(
        out, functional.one_hot(y, 3).double(), reduction="batchmean"
    ),
}


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (12,), generator=generator)


def net(ends: list[nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), *ends).double()


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_block_is_that_of_cross_entropy(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    data, model = [batch()], net([nn.LogSoftmax(1)])
    diagonal = kronecker_factors(model, loss, data, fisher="exact", kind="diagonal")["0"]
    exact = dense_ggn(net([]), nn.CrossEntropyLoss(), *data[0], "0")
    torch.testing.assert_close(
        diagonal.to_dense().diagonal(dim1=-2, dim2=-1), exact.diagonal(dim1=-2, dim2=-1)
    )


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_steps_are_those_of_cross_entropy(
    loss: Callable[[Tensor, Tensor], Tensor], options: dict[str, Any]
) -> None:
    x, y = batch()
    ends = []
    for last, own in (([], functional.cross_entropy), ([nn.LogSoftmax(1)], loss)):
        model = net(list(last))
        opt = KFAC(model, fisher="exact", **options)
        for _ in range(3):
            opt.zero_grad()
            opt.observe(own(model(x), y)).backward()
            opt.step()
        ends.append(model[0].weight.detach())
    torch.testing.assert_close(*ends)


class Rearranged(nn.Module):
    """Log-probabilities ``[c, n]``, computed for rows of scores."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.log_softmax(1).view(3, 4, 3).flatten(0, 1).t()


def test_log_probabilities_may_be_rearranged() -> None:
    x, y = batch()
    found = kronecker_factors(
        net([Rearranged()]),
        lambda out, y: functional.nll_loss(out.t(), y),
        [(x, y)],
        fisher="exact",
    )["0"]
    expected = kronecker_factors(net([]), nn.CrossEntropyLoss(), [(x, y)], fisher="exact")["0"]
    torch.testing.assert_close(found.to_dense(), expected.to_dense())


def test_weights_of_both_signs_count_by_their_magnitudes() -> None:
    x, y = batch()
    sign, model = torch.linspace(-1, 1, 12, dtype=torch.float64), net([nn.LogSoftmax(1)])
    found, expected = (
        kronecker_factors(model, partial(weighted, weight=weight), [(x, y)], fisher="exact")["0"]
        for weight in (sign, sign.abs())
    )
    torch.testing.assert_close(found.to_dense(), expected.to_dense())


def weighted(out: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    return -(out.gather(1, y[:, None])[:, 0] * weight).mean()


def test_other_functions_have_the_empirical_fisher() -> None:
    def loss(out: Tensor, y: Tensor) -> Tensor:
        return out.gather(1, y[:, None]).exp().neg().mean()

    x, y = batch()
    exact, empirical = (
        kronecker_factors(net([nn.LogSoftmax(1)]), loss, [(x, y)], fisher=fisher)["0"].to_dense()
        for fisher in ("exact", "empirical")
    )
    torch.testing.assert_close(exact, empirical)


class Returned(nn.Module):
    """Returns logarithms of sums of exponentials, as the densities of a mixture."""

    def forward(self, scores: Tensor) -> Tensor:
        return scores.logsumexp(1)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_model_that_ends_with_logarithms_of_sums(sign: float) -> None:
    x, _ = batch()
    model = net([Returned()])
    opt, losses = KFAC(model), list[float]()
    for _ in range(3):
        opt.zero_grad()
        loss = opt.observe(sign * model(x).mean())
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[2] < losses[0]

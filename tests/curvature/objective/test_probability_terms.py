"""Overlaps of masks have the information of their probabilities, weighted by slopes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from loss_curvature import loss_curvature, read_loss
from torch import Tensor
from torch.func import grad, jacrev
from torch.nn import functional

Loss = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(5, 3, 4, generator=GENERATOR, dtype=torch.float64)
MASK = (torch.rand(5, 3, 4, generator=GENERATOR) > 0.6).double()
WEIGHT = torch.randn(3, 3, generator=GENERATOR, dtype=torch.float64)


def dice(p: Tensor) -> Tensor:
    return 1 - ((2 * (p * MASK).sum(2) + 1) / (p.sum(2) + MASK.sum(2) + 1)).mean()


def jaccard(p: Tensor) -> Tensor:
    shared = (p * MASK).sum()
    return 1 - shared / (p.sum() + MASK.sum() - shared)


def tversky(p: Tensor) -> Tensor:
    hits = (p * MASK).sum((1, 2))
    misses, extras = ((1 - p) * MASK).sum((1, 2)), (p * (1 - MASK)).sum((1, 2))
    return 1 - (hits / (hits + 0.7 * misses + 0.3 * extras)).mean()


OVERLAPS = {"dice": dice, "jaccard": jaccard, "tversky": tversky}


@pytest.mark.parametrize("factor", [1.0, 1e3])
@pytest.mark.parametrize("name", OVERLAPS)
def test_sigmoids(name: str, factor: float) -> None:
    p = X.sigmoid()
    own = grad(OVERLAPS[name])(p).abs() / 2 * p * (1 - p)
    found = loss_curvature(lambda o: factor * OVERLAPS[name](o.sigmoid()), X)
    torch.testing.assert_close(found, factor * own.flatten().diag())


@pytest.mark.parametrize("name", OVERLAPS)
def test_softmax(name: str) -> None:
    p = X.softmax(1)
    weight = grad(OVERLAPS[name])(p)
    spread = (weight.amax(1, keepdim=True) - weight.amin(1, keepdim=True)) / 2
    found = loss_curvature(lambda o: OVERLAPS[name](o.softmax(1)), X)
    probabilities = p.transpose(1, 2)
    blocks = torch.diag_embed(probabilities)
    blocks = blocks - probabilities.unsqueeze(-1) * probabilities.unsqueeze(-2)
    scaled = (blocks * spread.transpose(1, 2).unsqueeze(-1)).flatten(0, 1)
    order = torch.arange(60).reshape(5, 3, 4).transpose(1, 2).flatten()
    torch.testing.assert_close(found[order][:, order], torch.block_diag(*scaled))


@pytest.mark.parametrize("name", OVERLAPS)
@pytest.mark.parametrize("last", [torch.sigmoid, lambda o: o.softmax(1)])
def test_a_model_that_ends_with_probabilities(name: str, last: Loss) -> None:
    """The curvature by the probabilities is that by the scores, which it leads back to."""
    jacobian = jacrev(last)(X).reshape(X.numel(), X.numel())
    found = loss_curvature(OVERLAPS[name], X, last)
    expected = loss_curvature(lambda o: OVERLAPS[name](last(o)), X)
    torch.testing.assert_close(jacobian.mT @ found @ jacobian, expected)


OTHERS: dict[str, Loss] = {
    "squares": lambda o: (o.sigmoid() - MASK).square().mean(),
    "cross entropy beside it": lambda o: (
        functional.binary_cross_entropy_with_logits(o, MASK) + dice(o.sigmoid())
    ),
    "absolute differences": lambda o: (o.softmax(1) - MASK).abs().mean(),
    "another network": lambda o: dice(torch.einsum("ij,njk->nik", WEIGHT, o).sigmoid()),
}
"""Losses in which it does not take part: with curvature, with information, of other scores."""


@pytest.mark.parametrize("name", OTHERS)
def test_other_losses_keep_their_curvature(name: str) -> None:
    names = {term.curvature.name for term in read_loss(OTHERS[name], X).terms()}
    assert "the information of probabilities, by their slopes" not in names

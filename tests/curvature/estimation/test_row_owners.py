"""Layers with one row per example, which other examples share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

FISHERS = ["exact", "empirical"]
MODES = ["similarity", "negatives", "a little", "mean", "causal", "time first", "later ones"]


class Mixing(nn.Module):
    """A layer on one row per example, whose features several examples share.

    Args:
        mode: How they share them.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mode = nn.Linear(4, 5).double(), mode
        self.register_buffer("weight", torch.randn(5, 3).double())
        self.row = self.made = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.row, self.made = x, self.layer(x)
        h = self.made.tanh()
        if self.mode == "similarity":
            return h @ h.detach().flip(1).T + h @ h.T / 9
        if self.mode == "negatives":
            h = h - 0.3 * h.roll(2, 0)
        if self.mode == "a little":
            h = h - 0.05 * h.roll(1, 0)
        if self.mode == "mean":
            h = (h - h.mean(0)) / (h.var(0) + 0.1).sqrt()
        if self.mode == "causal":  # sequences of two positions, flattened
            h = h.unflatten(0, (-1, 2)).cumsum(1).flatten(0, 1)
        if self.mode == "time first":  # of two sequences, flattened
            h = h.unflatten(0, (-1, 2)).cumsum(0).flatten(0, 1)
        if self.mode == "later ones":
            h = torch.cat([h[:2], h[2:] + h[:1]])
        result: Tensor = h @ self.weight
        return result


def single_gradients(outputs: Tensor, y: Tensor, made: Tensor, fisher: str) -> list[list[Tensor]]:
    """Gradients at a layer of each example's own loss, or of the roots of its Hessian."""
    result = []
    for example, p in enumerate(outputs.detach().softmax(1)):
        one = torch.eye(len(p)).double()
        roots = p.sqrt()[:, None] * (one - p) if fisher == "exact" else (p - one[y[example]])[None]
        own = [torch.autograd.grad(outputs[example], made, r, retain_graph=True)[0] for r in roots]
        result.append(own)
    return result


@pytest.mark.parametrize("fisher", FISHERS)
@pytest.mark.parametrize("mode", MODES)
def test_examples_that_share_rows(mode: str, fisher: Any) -> None:
    """The gradient of an example alone is also in the rows of others."""
    model, loss_fn, x = Mixing(mode), nn.CrossEntropyLoss(), torch.randn(6, 4).double()
    y = torch.randint(3, (6,))
    found = single_gradients(model(x), y, model.made, fisher)
    rows = torch.cat([x, torch.ones(6, 1).double()], 1)
    squares = sum(g.T @ g for own in found for g in own)
    data = [(x, y)]
    block = kronecker_factors(model, loss_fn, data, fisher=fisher)["layer"].to_dense()
    torch.testing.assert_close(block[0], torch.kron(squares, rows.T @ rows) / 36)
    diagonal = kronecker_factors(model, loss_fn, data, fisher=fisher, kind="diagonal")["layer"]
    want = sum((g.T @ rows).square() for own in found for g in own) / 6
    torch.testing.assert_close(diagonal.to_dense()[0].diagonal(), want.flatten())
    reduced = kronecker_factors(model, loss_fn, data, fisher=fisher, approximation="reduce")
    sums = torch.stack([g.sum(0) for own in found for g in own])
    a = torch.outer(rows.mean(0), rows.mean(0))
    torch.testing.assert_close(
        reduced["layer"].to_dense()[0], torch.kron(sums.T @ sums, a) / 6, atol=1e-12, rtol=1e-7
    )


class Video(nn.Module):
    """A convolution with one channel on the frames of videos."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Conv2d(1, 1, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        frames: Tensor = self.layer(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        return frames.sum((1, 2)).flatten(1)


@pytest.mark.parametrize("videos", [1, 2])
def test_frames_of_one_video_are_no_channels(videos: int) -> None:
    model, x = Video(), torch.randn(videos, 4, 1, 3, 3).double()
    data = [(x, torch.zeros(videos, 4).double())]
    options: dict[str, Any] = {"fisher": "exact", "kind": "diagonal"}
    found = kronecker_factors(model, nn.MSELoss(reduction="sum"), data, **options)["layer"]
    want, (weight, bias) = torch.zeros(5).double(), model.layer.parameters()
    for output in model(x).flatten():
        gradients = torch.autograd.grad(output, (weight, bias), retain_graph=True)
        want += 2 * torch.cat([g.flatten() for g in gradients]).square()
    torch.testing.assert_close(found.to_dense()[0].diagonal(), want)


class Features(Mixing):
    """The features themselves, of which pairs of examples are scored."""

    def forward(self, x: Tensor) -> Tensor:
        super().forward(x)
        h = self.made.tanh()
        if self.mode == "past the call":
            h = h + nn.functional.linear(x.flip(0), self.layer.weight)
        return h + 0.5 * h.roll(1, 0) if self.mode == "mixed" else h


@pytest.mark.parametrize("mode", ["mixed", "apart", "past the call"])
def test_scores_of_pairs_are_not_divided(mode: str) -> None:
    """The curvature of a score belongs to both examples together."""
    pairs, y = torch.tensor([[0, 1, 1], [2, 3, 2]]), torch.tensor([0.0, 1.0, 1.0]).double()
    model, x = Features(mode), torch.randn(6, 4).double()

    def scores_of(h: Tensor) -> Tensor:
        return (h[pairs[0]] * h[pairs[1]]).sum(1)

    def loss_fn(h: Tensor, target: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(scores_of(h), target)

    scores = scores_of(model(x))
    p = scores.detach().sigmoid()
    own = [*model.layer.parameters()] if mode == "past the call" else [model.made]
    found = [torch.autograd.grad(s, own, retain_graph=True) for s in scores]
    data = [(x, y)]
    block = kronecker_factors(model, loss_fn, data, fisher="exact")["layer"].to_dense()[0]
    if mode == "past the call":
        whole = sum(q * (1 - q) / 3 * g.square().sum() for q, gs in zip(p, found) for g in gs)
        torch.testing.assert_close(block.trace(), whole)
    else:
        squares = sum(q * (1 - q) / 3 * g.T @ g for q, (g,) in zip(p, found))
        rows = torch.cat([x, torch.ones(6, 1).double()], 1)
        torch.testing.assert_close(block, torch.kron(squares, rows.T @ rows) / 6)

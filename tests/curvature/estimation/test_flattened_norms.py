"""Batch normalisation of rows that several stand for one example, as frames and nodes do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature import kronecker_factors

EXAMPLES, ROWS, CHANNELS = 4, 3, 2
OWNERS = torch.tensor([0, 2, 1, 1, 3, 0, 2, 2, 3, 1, 0, 1])
"""The example of each row of a graph's nodes."""


class Frames(nn.Module):
    """Features of frames, each normalised over the frames of all examples.

    Args:
        mode: The order of the frames.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.mode = mode
        self.first = nn.Conv2d(2, CHANNELS, 2).double()
        self.norm = nn.BatchNorm2d(CHANNELS).double()
        self.last = nn.Linear(CHANNELS * 4, 3).double()
        self.given = self.made = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        """Classify ``[n, t, 2, 3, 3]``."""
        rows = x.transpose(0, 1) if self.mode == "time first" else x
        self.given = self.first(rows.flatten(0, 1))
        self.made = self.norm(self.given)
        h = self.made.tanh().flatten(1)
        sizes = (ROWS, EXAMPLES) if self.mode == "time first" else (EXAMPLES, ROWS)
        if self.mode == "nodes":
            sums = h.new_zeros(EXAMPLES, h.shape[1]).index_add(0, OWNERS, h)
        else:
            sums = h.unflatten(0, sizes).sum(sizes.index(ROWS))
        result: Tensor = self.last(sums)
        return result


def roots(outputs: Tensor) -> list[Tensor]:
    """Vectors with the second moment of the Hessian of cross entropy, of each example's loss."""
    p = outputs.detach().softmax(1)
    one = torch.eye(3).double()
    return [p[:, c : c + 1].sqrt() * (one[c] - p) for c in range(3)]


@pytest.mark.parametrize("mode", ["example first", "time first", "nodes"])
def test_rows_are_normalised_together(mode: str) -> None:
    model, x = Frames(mode), torch.randn(EXAMPLES, ROWS, 2, 3, 3).double()
    x[:, 1] *= 1e-2  # of a smaller variance than the others
    data: Any = [(x, torch.tensor([0, 1, 2, 1]))]
    block = kronecker_factors(model, nn.CrossEntropyLoss(), data, fisher="exact")["norm"]
    outputs = model(x)
    a = functional.batch_norm(model.given.detach(), None, None, training=True)
    a = a.transpose(0, 1).flatten(1)  # c (rows s)
    ones = torch.ones_like(a)
    rows = torch.stack([a, ones], 1)
    torch.testing.assert_close(block.A, rows @ rows.mT / EXAMPLES)
    found = [
        torch.autograd.grad(outputs, model.made, r, retain_graph=True)[0] for r in roots(outputs)
    ]
    squares = sum(g.square().sum((0, 2, 3)) for g in found)
    torch.testing.assert_close(block.B.flatten(), squares / ones[0].numel())


@pytest.mark.parametrize("mode", ["example first", "time first"])
def test_rows_of_an_example_are_summed_by_reduce(mode: str) -> None:
    model, x = Frames(mode), torch.randn(EXAMPLES, ROWS, 2, 3, 3).double()
    data: Any = [(x, torch.tensor([0, 1, 2, 1]))]
    options: dict[str, Any] = {"fisher": "exact", "approximation": "reduce"}
    block = kronecker_factors(model, nn.CrossEntropyLoss(), data, exclude=["first"], **options)
    model(x)
    a = functional.batch_norm(model.given.detach(), None, None, training=True)
    sizes = (ROWS, EXAMPLES) if mode == "time first" else (EXAMPLES, ROWS)
    a = a.unflatten(0, sizes).movedim(sizes.index(EXAMPLES), 0).mean((1, 3, 4)).T  # c n
    rows = torch.stack([a, torch.ones_like(a)], 1)
    torch.testing.assert_close(block["norm"].A, rows @ rows.mT / EXAMPLES)


@pytest.mark.parametrize("mode", ["example first", "time first"])
def test_gradients_of_an_example_are_those_of_all_its_rows(mode: str) -> None:
    model, x = Frames(mode), torch.randn(EXAMPLES, ROWS, 2, 3, 3).double()
    data: Any = [(x, torch.tensor([0, 1, 2, 1]))]
    options: dict[str, Any] = {"fisher": "exact", "kind": "diagonal", "exclude": ["first"]}
    block = kronecker_factors(model, nn.CrossEntropyLoss(), data, **options)["norm"].to_dense()
    outputs = model(x)
    a = functional.batch_norm(model.given.detach(), None, None, training=True)
    sizes = (ROWS, EXAMPLES) if mode == "time first" else (EXAMPLES, ROWS)
    want = torch.zeros(CHANNELS, 2).double()
    for root in roots(outputs):
        (g,) = torch.autograd.grad(outputs, model.made, root, retain_graph=True)
        own = torch.stack([(g * a).sum((2, 3)), g.sum((2, 3))], -1)
        want += own.unflatten(0, sizes).sum(sizes.index(ROWS)).square().sum(0) / EXAMPLES
    torch.testing.assert_close(block.diagonal(dim1=1, dim2=2), want)

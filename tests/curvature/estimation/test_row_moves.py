"""Rows that each batch leads to other examples, as the edges of a graph do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.estimation import row_moves

ROWS = 6
APART, TOGETHER = [[0, 1], [2, 3], [4, 5]], [[0, 1], [1, 2], [1, 5]]
LATE = [[0, 1], [2, 3], [0, 3]]
"""Pairs of rows; in the last, the first two pairs have no row in common."""


class Pairs(nn.Module):
    """Scores of pairs of rows.

    Args:
        mode: How the rows of a pair are found.
    """

    def __init__(self, mode: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.mode = nn.Linear(4, 5).double(), mode
        self.register_buffer("weight", torch.randn(5, 2).double())
        self.made = torch.zeros(0)

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        self.made = self.layer(x)
        h = self.made.tanh()
        if self.mode == "index":
            h = h[pairs].sum(1)
        if self.mode == "index_add":
            into = torch.arange(len(pairs)).repeat_interleave(2)
            h = torch.zeros(len(pairs), 5).double().index_add(0, into, h[pairs.flatten()])
        if self.mode == "slices":
            h = torch.stack([h[i : i + 1][0] + h[j] for i, j in pairs.tolist()])
        if self.mode in ("matrix", "sparse"):
            matrix = torch.zeros(len(pairs), ROWS).double().scatter(1, pairs, 1.0)
            h = matrix @ h if self.mode == "matrix" else torch.sparse.mm(matrix.to_sparse(), h)
        result: Tensor = h @ self.weight
        return result


def batch(pairs: list[list[int]], seed: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
    x = torch.randn(ROWS, 4, generator=torch.Generator().manual_seed(seed)).double()
    return (x, torch.tensor(pairs)), torch.arange(len(pairs)) % 2


def gradients(model: Pairs, data: Any, fisher: str) -> list[Tensor]:
    """Gradients at the layer of each example's own loss, or of the roots of its Hessian."""
    (x, pairs), y = data
    outputs, one, found = model(x, pairs), torch.eye(2).double(), []
    for example, p in enumerate(outputs.detach().softmax(1)):
        roots = p.sqrt()[:, None] * (one - p) if fisher == "exact" else (p - one[y[example]])[None]
        kept = {"retain_graph": True}
        found += [torch.autograd.grad(outputs[example], model.made, r, **kept)[0] for r in roots]
    return found


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("mode", ["index", "index_add", "slices", "matrix", "sparse"])
def test_each_batch_decides_which_rows_are_shared(mode: str, fisher: Any) -> None:
    model, batches = Pairs(mode), [batch(p, i) for i, p in enumerate([APART, TOGETHER, LATE])]
    a = b = torch.zeros(())
    rows = 0
    for (data, y), shares in zip(batches, (1, 3, 3)):
        found = gradients(model, (data, y), fisher)
        ones = torch.cat([data[0], torch.ones(ROWS, 1).double()], 1)
        a, rows = a + shares * ones.T @ ones / 9, rows + shares * ROWS
        b = b + sum(g.T @ g for g in found)
    for order in ([0, 1, 2], [2, 0, 1]):
        data = [batches[i] for i in order]
        block = kronecker_factors(model, nn.CrossEntropyLoss(), data, fisher=fisher)["layer"]
        torch.testing.assert_close(block.A[0], a)
        torch.testing.assert_close(block.B[0], b / rows)


class Late(Pairs):
    """The first two examples do not use the rows."""

    def forward(self, x: Tensor, pairs: Tensor) -> Tensor:
        result: Tensor = super().forward(x, pairs) * (torch.arange(len(pairs)) > 1)[:, None]
        return result


@pytest.mark.parametrize("mode", ["index", "matrix"])
def test_examples_that_share_rows_after_two_that_use_none(mode: str) -> None:
    model, pairs = Late(mode), [[0, 1], [2, 3], [4, 5], [5, 4]]
    data, y = batch(pairs, 0)
    found = gradients(model, (data, y), "exact")
    block = kronecker_factors(model, nn.CrossEntropyLoss(), [(data, y)], fisher="exact")["layer"]
    torch.testing.assert_close(block.B[0], sum(g.T @ g for g in found) / (4 * ROWS))


def test_sampled_factors_have_one_scale() -> None:
    """A batch of other sizes, whose first examples share rows, counts as much as the others."""
    (more, pairs), y = batch(APART, 0)
    data = [((torch.cat([more, more[:1]]), pairs), y), batch(TOGETHER, 1)]
    block = kronecker_factors(Pairs("index"), nn.CrossEntropyLoss(), data, fisher="mc")["layer"]
    x = torch.cat([x for (x, _), _ in data])
    rows = torch.cat([x, torch.ones(len(x), 1).double()], 1)
    torch.testing.assert_close(block.A[0], rows.T @ rows / 6)


class Sums(nn.Module):
    """Sums over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        into = torch.arange(len(lengths)).repeat_interleave(lengths)
        return torch.zeros(len(lengths), 2).index_add(0, into, self.layer(x))


@pytest.mark.parametrize("fisher", ["exact", "mc"])
@pytest.mark.parametrize(
    "options", [{"approximation": "reduce"}, {"kind": "ekfac"}, {"kind": "diagonal"}]
)
def test_lengths_that_change_are_refused_where_they_count(options: Any, fisher: Any) -> None:
    """The lengths of the first batch, or of the first two examples, are not those of all."""
    model, y = Sums(), torch.tensor([0, 1, 0, 1])
    data = [((torch.randn(12, 4), torch.tensor(n)), y) for n in ([3, 3, 3, 3], [3, 3, 2, 4])]
    loss_fn = nn.CrossEntropyLoss()
    kronecker_factors(model, loss_fn, data[:1], fisher=fisher, **options)
    for chosen in (data, data[1:]):
        with pytest.raises(ValueError, match="'layer'"):
            kronecker_factors(model, loss_fn, chosen, fisher=fisher, **options)


@pytest.mark.parametrize(("approximation", "walks"), [("expand", 1), ("reduce", 4)])
def test_a_batch_walks_its_graph_once(
    monkeypatch: pytest.MonkeyPatch, approximation: str, walks: int
) -> None:
    """And another time behind what moves rows.

    Where examples need not be known, the graph is walked for calls that are new alone.
    """
    found, kept = [], row_moves.reached_nodes
    monkeypatch.setattr(row_moves, "reached_nodes", lambda own: found.append(own) or kept(own))
    model, loss_fn = Pairs("index"), nn.CrossEntropyLoss()
    data = [batch(APART, seed) for seed in range(2)]
    kronecker_factors(model, loss_fn, data, fisher="mc", approximation=approximation)
    assert len(found) == walks

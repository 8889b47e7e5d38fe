"""Layers on rows that data choose: masks, indices, experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

OPTIONS: list[dict[str, Any]] = [
    {"approximation": "reduce"},
    {"kind": "diagonal"},
    {"kind": "ekfac"},
]
RAGGED = [[2, 2, 3, 1], [1, 1, 2, 0], [1, 1, 0, 2, 1], [0, 0, 1, 3], [2, 2] + [3, 1] * 9]
REFUSAL = r"The calls of 'layer' must each have rows"


class Masked(nn.Module):
    """A layer on the positions whose first entry is positive, with the sum of its rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        chosen = x[..., 0] > 0
        h = self.layer(x[chosen])
        result: Tensor = h.new_zeros(*x.shape[:2], 3).index_put((chosen,), h).sum(1)
        return result


class Experts(nn.Module):
    """Two experts; the sign of the first entry decides which one a row goes to."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.second = nn.Linear(4, 3).double(), nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        result = rows.new_zeros(len(rows), 3)
        for expert, own in ((self.layer, rows[:, 0] > 0), (self.second, rows[:, 0] <= 0)):
            index = own.nonzero().flatten()
            result = result.index_add(0, index, expert(rows[index]))
        return result.unflatten(0, x.shape[:2]).sum(1)


class Contrast(nn.Module):
    """Similarities of the examples' features, without those to themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        h = nn.functional.normalize(self.layer(x), dim=1)
        others = ~torch.eye(len(x), dtype=torch.bool)
        return (h @ (h + h.roll(1, 0)).T / 0.5)[others].reshape(len(x), -1)


def batch(lengths: Sequence[int]) -> tuple[Tensor, Tensor]:
    """A batch with some numbers of chosen positions per example, of three."""
    generator = torch.Generator().manual_seed(len(lengths))
    x = torch.randn(len(lengths), 3, 4, generator=generator).double()
    chosen = torch.arange(3) < torch.tensor(lengths)[:, None]
    x[..., 0] = torch.where(chosen, 1.0, -1.0)
    return x, torch.randint(3, (len(lengths),), generator=generator)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("lengths", RAGGED)
def test_rows_that_only_look_regular_are_refused(
    lengths: list[int], options: dict[str, Any]
) -> None:
    """As many rows as the examples would have with the same number of positions each."""
    for model in (Masked(), Experts()):
        with pytest.raises(ValueError, match=REFUSAL):
            kronecker_factors(model, nn.CrossEntropyLoss(), [batch(lengths)], **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_that_are_regular_in_the_first_batch_only(options: dict[str, Any]) -> None:
    data = [batch([2] * 4), batch([2, 1, 3, 2])]
    model, loss_fn = Masked(), nn.CrossEntropyLoss()
    assert kronecker_factors(model, loss_fn, data[:1], **options)
    with pytest.raises(ValueError, match=REFUSAL):
        kronecker_factors(model, loss_fn, data, **options)


@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_regular_chosen_rows_have_the_diagonal_of_their_examples(fisher: Any) -> None:
    model, loss_fn, (x, y) = Masked(), nn.CrossEntropyLoss(), batch([2] * 20)
    found = kronecker_factors(model, loss_fn, [(x, y)], fisher=fisher, kind="diagonal")["layer"]
    rows = torch.cat([x, torch.ones(20, 3, 1).double()], 2)[:, :2].sum(1)
    want = torch.zeros(3, 5).double()
    for row, p, label in zip(rows, model(x).detach().softmax(1), y):
        one = torch.eye(3).double()
        roots = p.sqrt()[:, None] * (one - p) if fisher == "exact" else (p - one[label])[None]
        want += roots.square().sum(0)[:, None] * row.square() / 20
    torch.testing.assert_close(found.to_dense()[0].diagonal(), want.flatten())


@pytest.mark.parametrize("options", OPTIONS)
def test_rows_that_examples_share_are_no_rows_of_another_example(options: dict[str, Any]) -> None:
    """A mask behind a layer that mixes examples gives no row to a single other one."""
    data = [(torch.randn(6, 4).double(), torch.randint(5, (6,)))]
    assert kronecker_factors(Contrast(), nn.CrossEntropyLoss(), data, **options)


@pytest.mark.parametrize("options", OPTIONS)
def test_chosen_entries_of_own_rows_are_accepted(options: dict[str, Any]) -> None:
    """The values of actions, as one gathers them."""

    class Values(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).gather(1, torch.arange(len(x))[:, None] % 3).squeeze(1)

    data = [(torch.randn(6, 4).double(), torch.randn(6).double())]
    assert kronecker_factors(Values(), nn.MSELoss(), data, **options)

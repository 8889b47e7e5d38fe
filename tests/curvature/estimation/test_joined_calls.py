"""Small calls of one layer, whose factors are computed together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import KroneckerFactors, LinearRule, kronecker_factors
from einconv_kfac.curvature.estimation import factor_sums


class Loop(nn.Module):
    """A recurrent cell, attention of several lengths, and an output layer in a loop.

    Args:
        is_flat: Whether the examples of the loss are the positions.
    """

    def __init__(self, is_flat: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cell, self.output = nn.RNNCell(4, 6), nn.Linear(6, 3)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.is_flat = is_flat
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h, states = x.new_zeros(len(x), 6), []
        for position in x.unbind(1):
            h = self.cell(position, h)
            states.append(h)
        s = torch.stack(states, 1)
        if self.is_flat:
            flat: Tensor = self.output(self.attention(s, s, s)[0]).flatten(0, 1)
            return flat
        few = s[:, :2]
        s = s + self.attention(s, few, few)[0] + self.attention(s, s, s)[0]
        s = s + self.attention(few, s, s)[0].mean(1, keepdim=True)
        result: Tensor = self.output(s[:, 0]) + self.output(s[:, -1]).tanh()
        return result


def blocks(model: nn.Module, count: int, **options: Any) -> KroneckerFactors:
    """Return the blocks for a batch of a number of sequences."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(count, 5, 4, dtype=torch.float64, generator=generator)
    y = torch.arange(len(model(x))) % 3
    return kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y)], **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"mc_samples": 3}, {"fisher": "exact"}, {"fisher": "empirical"}, {"max_factor_size": 4}],
)
@pytest.mark.parametrize(("count", "is_flat"), [(6, False), (1, False), (6, True)])
@pytest.mark.parametrize("entries", [1, 100])
def test_calls_together_and_one_by_one(
    options: dict[str, Any],
    count: int,
    is_flat: bool,
    entries: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    together = blocks(Loop(is_flat), count, **options)
    monkeypatch.setattr(factor_sums, "_JOINED_ENTRIES", entries)
    for name, alone in blocks(Loop(is_flat), count, **options).items():
        for own, other in zip((together[name].A, together[name].B), (alone.A, alone.B)):
            torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-14)


def test_rules_with_inputs_of_their_own_are_asked() -> None:
    class Own(LinearRule):
        def inputs(self, module: Any, x: Tensor, y_shape: Any) -> Tensor:
            return super().inputs(module, x, y_shape)

    assert LinearRule().may_join(nn.Linear(2, 2), torch.ones(3, 2))
    assert not Own().may_join(nn.Linear(2, 2), torch.ones(3, 2))

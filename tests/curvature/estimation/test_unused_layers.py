"""Layers that some batches do not use, against the curvature of all data by its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ggn import dense_empirical, dense_ggn
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors

REDUCTIONS = pytest.mark.parametrize("reduction", ["mean", "sum"])


class Branches(nn.Module):
    """A linear layer, and an expert for batches whose first entries are positive."""

    def __init__(self, called_on_nothing: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.expert = nn.Linear(3, 2).double(), nn.Linear(3, 2).double()
        self.called_on_nothing = called_on_nothing

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.shared(x)
        if x[0, 0] > 0:
            return result + self.expert(x)
        return result + self.expert(x[:0]).sum() if self.called_on_nothing else result


def batches(targets: str = "classes") -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    found = []
    for n, sign in ((5, 1.0), (2, -1.0), (4, 1.0), (3, -1.0)):
        x = torch.randn(n, 3).double()
        x[:, 0] = sign * x[:, 0].abs()
        y = torch.randint(2, (n,)) if targets == "classes" else torch.randn(n, 2).double()
        found.append((x, y))
    return found


def expected(block: Any, loss_fn: nn.Module, data: Any, name: str) -> Tensor:
    """The block of all data: batches without the layer have none."""
    model, total = Branches(), sum(len(x) for x, _ in data)
    used = [(x, y) for x, y in data if name == "shared" or x[0, 0] > 0]
    is_mean = getattr(loss_fn, "reduction", "mean") == "mean"
    weights = [len(x) / total if is_mean else 1.0 for x, _ in used]
    blocks = [w * block(model, loss_fn, x, y, name) for (x, y), w in zip(used, weights)]
    return torch.stack(blocks).sum(0)


@REDUCTIONS
@pytest.mark.parametrize("called_on_nothing", [False, True])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_diagonals_and_traces(fisher: Any, called_on_nothing: bool, reduction: str) -> None:
    data, loss_fn = batches(), nn.CrossEntropyLoss(reduction=reduction)
    block = dense_ggn if fisher == "exact" else dense_empirical
    model = Branches(called_on_nothing)
    for kind in ("diagonal", "ekfac"):
        found = kronecker_factors(model, loss_fn, data, fisher=fisher, kind=kind)
        for name in ("shared", "expert"):
            dense = expected(block, loss_fn, data, name)
            torch.testing.assert_close(found[name].trace(), dense[0].trace())
            if kind == "diagonal":
                torch.testing.assert_close(
                    found[name].to_dense(), torch.diag_embed(dense[0].diagonal())[None]
                )


@REDUCTIONS
@pytest.mark.parametrize("names", [["shared.weight", "expert.weight"], ["expert.weight"]])
def test_factors_of_linear_regression_are_exact(names: list[str], reduction: str) -> None:
    data, loss_fn = batches("numbers"), nn.MSELoss(reduction=reduction)
    found = kronecker_factors(Branches(), loss_fn, data, fisher="exact", parameters=names)
    for name, block in found.items():
        torch.testing.assert_close(block.to_dense(), expected(dense_ggn, loss_fn, data, name))


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_a_mean_over_examples_is_a_sum_over_their_number(kind: Any) -> None:
    data, model = batches(), Branches()
    mean, total = (
        kronecker_factors(model, nn.CrossEntropyLoss(reduction=r), data, fisher="exact", kind=kind)
        for r in ("mean", "sum")
    )
    for name in mean:
        torch.testing.assert_close(14 * mean[name].to_dense(), total[name].to_dense())


def test_batches_without_a_target_do_not_count() -> None:
    data, model, loss_fn = batches(), Branches(), nn.CrossEntropyLoss()
    ignored = [(x, torch.full_like(y, -100)) for x, y in data]
    options: dict[str, Any] = {"fisher": "exact", "kind": "diagonal"}
    found = kronecker_factors(model, loss_fn, [*data, *ignored], **options)
    for name, block in kronecker_factors(model, loss_fn, data, **options).items():
        torch.testing.assert_close(found[name].to_dense(), block.to_dense())

"""Factors above the largest size are diagonals, which are those of the dense factors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature import FisherEstimator, coverage, kronecker_factors

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, groups=2),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, padding=1, padding_mode="circular", bias=False),
        nn.GroupNorm(1, 3),
        nn.ConvTranspose2d(3, 2, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(144, 5),
        nn.Flatten(),
        nn.Linear(10, 3),
    ).double()


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = Generator().manual_seed(0)
    x = torch.randn(7, 2, 5, 5, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (7,), generator=generator)
    return [(x[:3], y[:3]), (x[3:], y[3:])]


@pytest.mark.parametrize("size", [1, 2, 9, 20])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", ["exact", "empirical", "forward-only"])
def test_diagonals_are_those_of_the_dense_factors(
    fisher: Any, approximation: Any, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("einconv_kfac.curvature.layers.rules.convolution._UNFOLDED_ENTRIES", 1000)
    model, loss_fn = network(), nn.CrossEntropyLoss()
    options: dict[str, Any] = {"fisher": fisher, "approximation": approximation}
    full = kronecker_factors(model, loss_fn, batches(), **options)
    cut = kronecker_factors(model, loss_fn, batches(), **options, max_factor_size=size)
    forms = set()
    for name, block in full.items():
        for dense, ours in ((block.A, cut[name].A), (block.B, cut[name].B)):
            is_large = dense.shape[-1] > size
            expected = dense.diagonal(dim1=-2, dim2=-1) if is_large else dense
            torch.testing.assert_close(ours, expected, **TOLERANCE)
            forms.add(is_large)
    assert forms == {True, False}


@pytest.mark.parametrize("size", [1, 9])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ekfac_keeps_the_trace(size: int, reduction: str) -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss(reduction=reduction)
    options: dict[str, Any] = {"fisher": "exact", "max_factor_size": size}
    corrected = kronecker_factors(model, loss_fn, batches(), kind="ekfac", **options)
    diagonal = kronecker_factors(model, loss_fn, batches(), kind="diagonal", **options)
    for name, block in corrected.items():
        _, rows, columns = block.layout.shape
        assert (block.basis_a is None, block.basis_b is None) == (columns > size, rows > size)
        torch.testing.assert_close(block.trace(), diagonal[name].trace(), **TOLERANCE)


def test_weights_of_many_rows_are_covered() -> None:
    assert not coverage(nn.Sequential(nn.Embedding(100_000, 2), nn.Linear(2, 100_000))).gaps()


@pytest.mark.parametrize("size", [0, -1, 2.0, True, None, "8"])
def test_the_size_must_be_a_positive_integer(size: Any) -> None:
    with pytest.raises(ValueError, match="`max_factor_size` must be a positive integer, got"):
        FisherEstimator(nn.MSELoss(), max_factor_size=size)

"""Products into results of all sizes: their value, symmetry and memory."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.curvature.factors.reduce import reduced_factor
from einconv_kfac.curvature.factors.symmetric import allocation, whole_products
from einconv_kfac.curvature.factors.symmetric.update import (
    DIAGONAL,
    PANEL,
    SHORT_SUM_TERMS,
    Target,
    prepare,
)

SIZES = (1, 9, PANEL - 1, PANEL + 2, 2 * PANEL, 2 * PANEL + 1, 3 * PANEL + 65)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("length", [3, SHORT_SUM_TERMS + 1])
def test_products_in_parts(size: int, groups: int, length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(2, groups, size, length, generator=generator, dtype=torch.float64)
    expected = torch.einsum("pgal,pgbl->gab", a, a)
    start = torch.ones(groups, size + 1, size + 1, dtype=torch.float64)
    for beta, out in ((0.0, None), (0.5, start)):
        update = prepare(a, (groups, size + 1), Target(out, beta, 3.0)).within(size)
        update.add_product_(a[0], last=False)
        update.added().add_product_(a[1])
        torch.testing.assert_close(update.out, beta + 3 * expected)
        assert torch.equal(update.out, update.out.mT)
    update = prepare(a, (groups, size), Target(alpha=3.0))
    update.add_product_(a.movedim(0, 2).flatten(2))
    torch.testing.assert_close(update.out, 3 * expected)
    assert torch.equal(update.out, update.out.mT)


def test_many_small_products() -> None:
    """More groups than are multiplied at a time."""
    groups = DIAGONAL // 16 + 3
    a = torch.randn(groups, 4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for out in (None, torch.ones(groups, 4, 4, dtype=torch.float64)):
        update = prepare(a, (groups, 4), Target(out, 0.0 if out is None else 1.0))
        update.add_product_(a)
        torch.testing.assert_close(update.out, a @ a.mT + (0 if out is None else 1))
        assert torch.equal(update.out, update.out.mT)


@pytest.mark.parametrize(("size", "length"), [(200, 31), (577, 31), (901, 31), (230, 400)])
@pytest.mark.parametrize("is_tested", [True, False])
def test_whole_products(
    size: int, length: int, is_tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In float32, where whole products are symmetric by themselves, or are not."""
    if not is_tested:
        monkeypatch.setattr(whole_products, "_is_symmetric", lambda *_: False)
    a = torch.randn(1, size, length, generator=torch.Generator().manual_seed(0))
    old = torch.randn(1, size + 1, size + 1, generator=torch.Generator().manual_seed(1))
    old = old + old.mT
    for beta, out in ((0.0, None), (0.3, old.clone())):
        with torch.no_grad():
            update = prepare(a, (1, size + 1), Target(out, beta, 0.7)).within(size)
            update.add_product_(a)
        expected = 0.7 * a.double() @ a.double().mT + beta * old[:, :size, :size]
        torch.testing.assert_close(update.out, expected.float(), rtol=1e-4, atol=1e-4)
        assert torch.equal(update.out, update.out.mT)


@pytest.mark.parametrize("size", [300, 577])
@pytest.mark.parametrize("is_tested", [True, False])
def test_new_whole_products(size: int, is_tested: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results that oneDNN allocated equal those that were updated."""
    sums = torch.randn(40, size, generator=torch.Generator().manual_seed(0))
    if not is_tested:
        monkeypatch.setattr(whole_products, "_is_symmetric", lambda *_: False)
    with torch.no_grad():
        got = reduced_factor(sums, 3, 1, Target(alpha=0.7), bias=True)
    ones = torch.cat([sums / 3, torch.ones(40, 1)], 1).double()
    expected = 0.7 * ones.mT @ ones
    torch.testing.assert_close(got[0], expected.float(), rtol=1e-4, atol=1e-4)
    assert torch.equal(got, got.mT)
    assert got.is_contiguous()


def test_large_results_are_ordinary_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    like, shape = torch.zeros(1), (1, 1100, 1100)
    for advise in (allocation._madvise(), None):
        monkeypatch.setattr(allocation, "_madvise", lambda advise=advise: advise)
        fresh = allocation.new_matrices(like, shape, torch.float64).fill_(2.0)
        assert fresh.shape == shape
        assert fresh.is_contiguous()
        assert fresh.sum() == 2.0 * 1100**2
        assert torch.equal(fresh.clone(), fresh)

"""Damped inverses of factors, and what happens where a decomposition fails."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.curvature.blocks.batching import LARGEST_BATCHED_DIMENSION, batched
from einconv_kfac.curvature.blocks.cholesky import Pair, invert_damped, split_damping

INDEFINITE = torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])  # eigenvalues 3 and -1


def pair(groups: int, rows: int, columns: int, dtype: torch.dtype = torch.float64) -> Pair:
    a, b = (torch.randn(groups, size, 2 * size, dtype=dtype) for size in (columns, rows))
    return a @ a.mT, b @ b.mT


def test_inverses_of_several_pairs() -> None:
    torch.manual_seed(0)
    pairs = [pair(2, 3, 4), pair(1, 4, 3), pair(2, 3, 4)]
    dampings = [0.1, 0.2, 0.3]
    for own, damping, found in zip(pairs, dampings, invert_damped(pairs, dampings, list("abc"))):
        assert (found.damping, found.retries) == (damping, 0)
        for index, (factor, part) in enumerate(zip(own, split_damping(own, damping))):
            damped = factor + part[:, None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype)
            torch.testing.assert_close(found.inverses[index], torch.linalg.inv(damped))
            expected = torch.linalg.cond(damped, 1).amax()
            torch.testing.assert_close(found.conditions()[index], expected)


@pytest.mark.parametrize("entries", [1, 9, 20])
def test_condition_numbers_of_large_factors(monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    """The norms are computed part by part."""
    monkeypatch.setattr("einconv_kfac.curvature.blocks.cholesky.NORM_ENTRIES", entries)
    monkeypatch.setattr("einconv_kfac.curvature.blocks.cholesky.NORM_SIZE", 1)
    torch.manual_seed(0)
    own = pair(2, 3, 4)
    (found,) = invert_damped([own], [0.1], ["a"])
    for factor, part, condition in zip(own, split_damping(own, 0.1), found.conditions()):
        damped = factor + part[:, None, None] * torch.eye(factor.shape[-1], dtype=factor.dtype)
        torch.testing.assert_close(condition, torch.linalg.cond(damped, 1).amax())


def test_a_failure_concerns_its_pair_alone() -> None:
    torch.manual_seed(0)
    good, bad = pair(1, 2, 2, torch.float32), (torch.eye(2)[None], INDEFINITE)
    names = ["good", "bad"]
    with pytest.raises(RuntimeError, match="damped factor B of bad must be positive definite"):
        invert_damped([good, bad], [0.05, 0.05], names)
    first, second = invert_damped([good, bad], [0.05, 0.05], names, damping_increases=2)
    (alone,) = invert_damped([good], [0.05], ["good"])
    torch.testing.assert_close(first.inverses[1], alone.inverses[1])
    assert (first.retries, first.damping) == (0, 0.05)
    assert (second.retries, second.damping) == (3, 5.0)
    assert second.inverses[1].dtype == torch.float64


@pytest.mark.parametrize("size", [3, LARGEST_BATCHED_DIMENSION + 1])
def test_batches_keep_the_order(size: int) -> None:
    torch.manual_seed(0)
    shapes = [(2, size), (1, 2), (1, size), (3, 2)]
    matrices = [torch.randn(groups, n, n) for groups, n in shapes]
    factors = [torch.full((groups,), float(i)) for i, (groups, _) in enumerate(shapes)]
    calls = []

    def scaled(matrix: torch.Tensor, factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(matrix.shape)
        return factor[:, None, None] * matrix, factor

    found = batched(scaled, matrices, factors)
    for matrix, factor, (product, same) in zip(matrices, factors, found):
        assert torch.equal(product, factor[:, None, None] * matrix)
        assert torch.equal(same, factor)
    assert len(calls) == (2 if size <= LARGEST_BATCHED_DIMENSION else 3)


@pytest.mark.parametrize("size", [0.0, 1e-38, 1.0, 1e30])
@pytest.mark.parametrize("damping", [1e-30, 1e-10, 1.0, 1e15])
def test_parts_of_the_damping_stay_in_range(size: float, damping: float) -> None:
    """Also where the other factor is zero."""
    large = torch.full((1, 3), size).diag_embed()
    for factors in ((large, torch.zeros(1, 2, 2)), (torch.zeros(1, 2, 2), large)):
        parts = split_damping(factors, damping)
        assert all(bool((part > 0).all() and part.isfinite().all()) for part in parts)
        product = float(parts[0].double() * parts[1].double())
        assert product == pytest.approx(damping, rel=1e-5)
        (found,) = invert_damped([factors], [damping], ["a"])
        assert all(bool(inverse.isfinite().all()) for inverse in found.inverses)


def test_an_inverse_out_of_range_is_an_error() -> None:
    tiny = torch.full((1, 2), 1e-42).diag_embed()
    with pytest.raises(RuntimeError, match="damped factor A of a must be positive definite"):
        invert_damped([(tiny, torch.eye(2)[None])], [0.0], ["a"])


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_matrices_in_many_layers(size: int, dtype: torch.dtype) -> None:
    """Also ill-conditioned ones, and layers with different dampings."""
    torch.manual_seed(0)
    pairs = [pair(groups, size, 2, torch.float64) for groups in (3, 1, 4, 2)]
    pairs[2][0][1] = torch.tensor([[1.0, 1 - 1e-4], [1 - 1e-4, 1.0]])
    pairs = [(a.to(dtype), b.to(dtype)) for a, b in pairs]
    dampings = [1e-3, 0.2, 1e-3, 1e-3]
    close = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else {}
    for own, damping, found in zip(pairs, dampings, invert_damped(pairs, dampings, list("abcd"))):
        assert found.retries == 0
        parts = split_damping(own, damping)
        conditions = []
        for factor, part, inverse in zip(own, parts, found.inverses):
            damped = factor.double() + part[:, None, None] * torch.eye(factor.shape[-1])
            torch.testing.assert_close(inverse.double(), torch.linalg.inv(damped), **close)
            conditions.append(torch.linalg.cond(damped, 1).amax())
        torch.testing.assert_close(found.conditions().double(), torch.stack(conditions), **close)


@pytest.mark.parametrize("position", [0, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_a_failure_in_a_stack_concerns_its_pair_alone(size: int, position: int) -> None:
    torch.manual_seed(0)
    pairs = [list(pair(2, size, size)) for _ in range(3)]
    indefinite = torch.tensor([4.0, -1.0, 1.0][:size], dtype=torch.float64).diag_embed()
    pairs[1][position] = indefinite.repeat(2, 1, 1)
    known: list[Pair] = [(a, b) for a, b in pairs]
    found = invert_damped(known, [0.5] * 3, list("abc"), damping_increases=12)
    assert [own.retries > 0 for own in found] == [False, True, False]
    (alone,) = invert_damped(known[:1], [0.5], ["a"])
    torch.testing.assert_close(found[0].inverses, alone.inverses)

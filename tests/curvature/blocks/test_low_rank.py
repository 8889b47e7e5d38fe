"""Inverses of factors of few rows, against torch's inverse of the whole matrix in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac.curvature.blocks.cholesky import invert_damped, split_damping
from einconv_kfac.curvature.blocks.low_rank import LEAST_SIZE, UNKNOWN, RankBound, low_rank

ROWS = 9


def factor(
    rows: int, size: int = LEAST_SIZE, groups: int = 1, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A factor of positive rows, with one eigenvalue far larger than the others."""
    x = torch.rand(groups, rows, size, generator=torch.Generator().manual_seed(rows)).to(dtype)
    return x.mT @ x / rows


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("damping", [1e-6, 1e-2])
def test_inverses_are_those_of_the_whole_matrix(groups: int, damping: float) -> None:
    pair = factor(ROWS, groups=groups), factor(3, 300, groups)
    bounds = RankBound(ROWS), RankBound(3)
    with FlopCounterMode(display=False) as counter:
        (found,) = invert_damped([pair], [damping], ["it"], bounds=[bounds])
    products = counter.get_total_flops()
    assert 0 < products < 2 * groups * (256**2 + 300**2) * 4 * 40  # no product of whole matrices
    for inverse, own, part in zip(found.inverses, pair, split_damping(pair, damping)):
        damped = own + part[:, None, None] * torch.eye(own.shape[-1], dtype=own.dtype)
        torch.testing.assert_close(inverse, torch.linalg.inv(damped), rtol=1e-7, atol=1e-9)
        assert torch.equal(inverse, inverse.mT)
    assert found.retries == 0


def test_is_exact_up_to_rounding_in_single_precision() -> None:
    """An inverse is known up to the condition number times the rounding, about 0.014 here."""
    pair = factor(ROWS, dtype=torch.float32), torch.ones(1, 1, 1)
    damped = pair[0].double() + split_damping(pair, 1e-6)[0].double() * torch.eye(LEAST_SIZE)
    expected = torch.linalg.inv(damped)
    (found,) = invert_damped([pair], [1e-6], ["it"], bounds=[(RankBound(ROWS), UNKNOWN)])
    error = torch.linalg.matrix_norm(found.inverses[0] - expected, 2)
    bound = torch.linalg.cond(damped, 2) * torch.finfo(torch.float32).eps
    assert bool(error < bound * torch.linalg.matrix_norm(expected, 2) / 4)


@pytest.mark.parametrize("tail", [1.0, 1e-4])
def test_a_larger_rank_than_the_bound_is_found(tail: float) -> None:
    """The part beyond the bound and the further vectors is small, or not."""
    larger = factor(ROWS) + tail * factor(40)
    assert low_rank(larger, ROWS) is None
    (found,) = invert_damped(
        [(larger, torch.ones(1, 1, 1).double())],
        [0.01],
        ["it"],
        bounds=[(RankBound(ROWS), UNKNOWN)],
    )
    part = split_damping((larger, torch.ones(1, 1, 1).double()), 0.01)[0]
    expected = torch.linalg.inv(larger + part * torch.eye(LEAST_SIZE))
    torch.testing.assert_close(found.inverses[0], expected)


def test_special_factors() -> None:
    zero = torch.zeros(1, LEAST_SIZE, LEAST_SIZE)
    form = low_rank(zero, 2)
    assert form is not None
    assert not form.core.any()
    assert low_rank(zero + torch.nan, 2) is None
    assert RankBound(ROWS).form(torch.eye(8)[None]) is None  # small
    assert RankBound(ROWS).form(torch.ones(1, LEAST_SIZE)) is None  # diagonal
    assert RankBound(LEAST_SIZE // 4).form(zero) is None  # not low
    assert UNKNOWN.form(zero) is None


def test_forms_are_found_once_and_repeat() -> None:
    own, bound = factor(ROWS), RankBound(ROWS)
    torch.manual_seed(0)
    first = torch.rand(())
    torch.manual_seed(0)
    form = bound.form(own)
    assert torch.equal(torch.rand(()), first)  # the global random state has not moved
    assert form is bound.form(own)
    assert bound.form(own.clone()) is not form
    again = bound.anew().form(own)
    assert form is not None
    assert again is not None
    assert torch.equal(form.basis, again.basis)

"""The division of lags among tasks."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.curvature.factors.algorithms.lags import LagReuse, lag_shares, positions_of
from einconv_kfac.curvature.factors.indices.lag_pairs import half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Axis, Geometry

AXES = [
    (Axis(9, 3, padding=(1, 1)), Axis(9, 3, padding=(1, 1))),
    (Axis(12, 5, stride=2, padding=(2, 2)), Axis(7, 3, dilation=2)),
    (Axis(6, 2), Axis(5, 3), Axis(5, 3, padding=(1, 0))),
]


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_each_lag_is_in_one_share(axes: tuple[Axis, ...], count: int) -> None:
    """Shares are at most as many as asked for, none is empty, and each lag is in one."""
    shares = lag_shares(axes, count)
    assert 1 <= len(shares) <= count
    assert all(shares)
    found = [key for groups in shares for group in groups for key in group]
    assert len(found) == len(half_of_lags(axes)) == len({*found})


def test_shares_are_even() -> None:
    """No share has more than the even part and one group."""
    axes = AXES[0]
    for count in (2, 3, 4):
        work = [sum(map(positions_of, groups)) for groups in lag_shares(axes, count)]
        groups = [positions_of(group) for groups in lag_shares(axes, count) for group in groups]
        assert max(work) <= sum(work) / count + max(groups)


def test_parts_of_the_work() -> None:
    """The parts add up to the whole."""
    problem = Problem(Geometry(AXES[0], 1), 4, 8, torch.float32, "cpu", threads=3)
    parts = LagReuse().shares(problem, 3)
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(1)

"""The division of lags among tasks."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.curvature.factors.algorithms.lag_shares import lag_shares, share_seconds
from einconv_kfac.curvature.factors.algorithms.lags import LagReuse
from einconv_kfac.curvature.factors.indices.lag_pairs import half_of_lags
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Axis, Geometry

AXES = [
    (Axis(9, 3, padding=(1, 1)), Axis(9, 3, padding=(1, 1))),
    (Axis(12, 5, stride=2, padding=(2, 2)), Axis(7, 3, dilation=2)),
    (Axis(6, 2), Axis(5, 3), Axis(5, 3, padding=(1, 0))),
]
CHANNELS = [8, 512]
"""Of small sums, which are written at the end, and of large ones, written lag by lag."""


def _problem(axes: tuple[Axis, ...], channels: int) -> Problem:
    return Problem(Geometry(axes, 1), 4, channels, torch.float32, "cpu", threads=3)


@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("count", [1, 2, 5, 100])
def test_each_lag_is_in_one_share(axes: tuple[Axis, ...], channels: int, count: int) -> None:
    """Shares are at most as many as asked for, none is empty, and each lag is in one."""
    shares = lag_shares(_problem(axes, channels), count)
    assert 1 <= len(shares) <= count
    assert all(shares)
    found = [key for groups in shares for group in groups for key in group]
    assert len(found) == len(half_of_lags(axes)) == len({*found})


@pytest.mark.parametrize("channels", CHANNELS)
def test_groups_share_their_left_operand(channels: int) -> None:
    """Lags of a group have the same positions of the left operand, and no other group has them."""
    for groups in lag_shares(_problem(AXES[1], channels), 3):
        operands = [{(key[1:], key[0].left) for key in group} for group in groups]
        assert all(len(own) == 1 for own in operands)
        assert len(set.union(*operands)) == len(groups)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("count", [2, 3, 4])
def test_shares_are_even(channels: int, count: int) -> None:
    """No share has more than the even part of all lags, and one lag."""
    problem = _problem(AXES[0], channels)
    work = [share_seconds(problem, groups) for groups in lag_shares(problem, count)]
    apart = [share_seconds(problem, ((key,),)) for key in half_of_lags(AXES[0])]
    assert max(work) <= sum(apart) / count + max(apart)


def test_parts_of_the_work() -> None:
    """The parts add up to the whole."""
    parts = LagReuse().shares(_problem(AXES[0], 8), 3)
    assert len(parts) == 3
    assert sum(parts) == pytest.approx(1)

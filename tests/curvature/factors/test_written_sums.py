"""Sums over regions in large and in small matrices, which are written in different ways."""

from __future__ import annotations

import pytest
import torch
from factor_definition import columns, factor

from einconv_kfac.curvature.factors.choice import ALGORITHMS
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric import region_sums, scatter
from einconv_kfac.curvature.factors.symmetric.update import Target, prepare
from einconv_kfac.geometry import Axis, Geometry

AXES = {
    "padded": (Axis(5, 3, 1, (1, 1)), Axis(6, 3, 1, (1, 0))),
    "without padding": (Axis(6, 3), Axis(5, 2)),
    "one region": (Axis(6, 2, 2), Axis(5, 3, 1, (1, 1))),
    "strided and dilated": (Axis(9, 3, 2, (1, 1)), Axis(8, 3, 1, (0, 1), 2)),
    "entries that meet padding alone": (Axis(2, 5, 1, (3, 3)), Axis(3, 3, 1, (1, 1))),
    "volume": (Axis(4, 3, 1, (1, 1)), Axis(3, 2), Axis(4, 3, 1, (1, 1))),
    "line": (Axis(7, 3, 1, (1, 1)),),
}


@pytest.mark.parametrize("least", [1, 1 << 40], ids=["large", "small"])
@pytest.mark.parametrize("axes", AXES.values(), ids=AXES)
@pytest.mark.parametrize("name", ["lags", "correlations", "bands"])
def test_sums_reach_their_entries(
    name: str, axes: tuple[Axis, ...], least: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter, "MATRIX_ELEMENTS", least)
    monkeypatch.setattr(region_sums, "MOST_GATHERED_CHANNELS", 0)
    for groups, beta in ((1, 0.0), (1, 1.0), (2, 0.0), (1, 0.5)):
        geometry = Geometry(axes, groups)
        generator = torch.Generator().manual_seed(0)
        shape = (4, groups * 3, *geometry.input_size)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        problem = Problem(geometry, 4, 3, torch.float64, "cpu")
        expected = factor(columns(x, geometry), "expand") * 4
        old = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
        old = old + old.mT
        target = prepare(x, (groups, problem.size), Target(old.clone(), beta, 2.0))
        with torch.no_grad():
            ALGORITHMS[name].add(x, problem, target)
        torch.testing.assert_close(target.out, beta * old + 2 * expected, rtol=1e-10, atol=1e-10)
        assert torch.equal(target.out, target.out.mT)

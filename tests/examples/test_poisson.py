"""The Poisson example: exact residuals, and the smaller error with fewer steps."""

import math

import poisson
import torch


class Exact(torch.nn.Module):
    def forward(self, points):
        return poisson.solution(points)[:, None]


def test_residuals_of_the_solution_are_zero():
    model = poisson.Residuals()
    model.network = Exact()
    inside, boundary = (points.double() for points in poisson.sample_points(seed=0))
    residual, deviation = model(inside, boundary)
    assert residual.abs().max() < 1e-12
    assert deviation.abs().max() < 1e-12
    assert model.error() == 0


def test_residuals_of_a_polynomial():
    model, points = poisson.Residuals(), torch.rand(7, 2, dtype=torch.float64)
    model.network = torch.nn.Sequential(Quadratic())
    residual, deviation = model(points, points)
    expected = 8 + 2 * math.pi**2 * poisson.solution(points)
    torch.testing.assert_close(residual, expected)
    torch.testing.assert_close(deviation, points[:, 0] ** 2 + 3 * points[:, 1] ** 2)


class Quadratic(torch.nn.Module):
    def forward(self, points):
        return points.square() @ torch.tensor([[1.0], [3.0]], dtype=torch.float64)


def test_points_of_the_boundary_are_on_all_sides():
    _, boundary = poisson.sample_points(seed=1)
    sides = [(boundary[:, axis] == end).sum() for axis in (0, 1) for end in (0, 1)]
    assert sides == [poisson.BOUNDARY // 4] * 4


def test_kfac_has_the_smaller_error(monkeypatch, capsys):
    monkeypatch.setattr(poisson, "INSIDE", 200)
    errors = poisson.main(["--steps", "20", "--multiple", "2", "--rates", "0.01", "0.03"])
    assert list(errors) == ["KFAC", "Adam 0.01", "Adam 0.03"]
    assert errors["KFAC"] < 0.8 * min(errors["Adam 0.01"], errors["Adam 0.03"])
    assert len(capsys.readouterr().out.splitlines()) == 3

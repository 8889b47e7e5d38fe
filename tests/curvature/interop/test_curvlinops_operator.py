"""Conversion to the linear operators of curvlinops."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import curvlinops

from einconv_kfac.curvature import KroneckerFactors, kronecker_factors
from einconv_kfac.curvature.interop.curvlinops import CurvatureOperator, to_kfac_operator

TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}


def curvature(groups: int, kind: str = "kfac") -> tuple[KroneckerFactors, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=groups), nn.Flatten(), nn.Linear(16, 3, bias=False)
    ).double()
    x, y = torch.randn(20, 2, 3, 3, dtype=torch.float64), torch.randint(3, (20,))
    loss_fn = nn.CrossEntropyLoss(reduction="sum")
    return kronecker_factors(model, loss_fn, [(x, y)], fisher="exact", kind=kind), model


def vectors(ours: KroneckerFactors, model: nn.Module) -> dict[str, Tensor]:
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shapes[name], generator=generator, dtype=torch.float64)
        for name in ours.parameters
    }


def test_kfac_operator_and_its_inverse() -> None:
    ours, model = curvature(1)
    operator = to_kfac_operator(ours, model)
    v = vectors(ours, model)
    columns = list(v.values())
    for got, expected in zip(operator @ columns, (ours @ v).values()):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    torch.testing.assert_close(operator.trace.cpu(), ours.trace(), **TOLERANCE)
    torch.testing.assert_close(operator.frobenius_norm.cpu(), ours.frobenius_norm(), **TOLERANCE)
    inverse = curvlinops.KFACInverseLinearOperator(operator, damping=0.3, use_exact_damping=True)
    for got, expected in zip(inverse @ columns, ours.solve(v, 0.3).values()):
        torch.testing.assert_close(got, expected, **TOLERANCE)
    heuristic = curvlinops.KFACInverseLinearOperator(
        to_kfac_operator(ours * (1 / 20), model), damping=0.3, use_heuristic_damping=True
    )
    factored = (ours * (1 / 20)).solve(v, 0.3, exact=False)
    for got, expected in zip(heuristic @ columns, factored.values()):
        torch.testing.assert_close(got, expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
def test_operator_of_any_blocks(kind: str) -> None:
    ours, model = curvature(2, kind)
    operator = CurvatureOperator(ours, model)
    matrix = operator @ torch.eye(operator.shape[1], dtype=torch.float64)
    torch.testing.assert_close(matrix.trace(), ours.trace(), **TOLERANCE)
    torch.testing.assert_close(matrix.norm(), ours.frobenius_norm(), **TOLERANCE)
    damped = operator + 0.5 * _identity(ours, model)
    inverse = curvlinops.CGInverseLinearOperator(damped, tolerance=1e-5)
    v = vectors(ours, model)
    for got, expected in zip(inverse @ list(v.values()), ours.solve(v, 0.5).values()):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def _identity(ours: KroneckerFactors, model: nn.Module) -> CurvatureOperator:
    square = ours.inverse(1.0).eigh()
    blocks = {
        name: type(block)(block.basis_a, block.basis_b, torch.ones_like(block.values), block.layout)
        for name, block in square.items()
    }
    return CurvatureOperator(KroneckerFactors(blocks), model)


def test_what_curvlinops_cannot_represent() -> None:
    ours, model = curvature(2)
    with pytest.raises(ValueError, match=r"'0' must be a Kronecker product without channel groups"):
        to_kfac_operator(ours, model)
    with pytest.raises(ValueError, match=r"got EigenBlock"):
        to_kfac_operator(ours.eigh(), model)
    model = nn.Sequential(nn.Conv1d(1, 2, 2), nn.Flatten()).double()
    data = [(torch.ones(2, 1, 3).double(), torch.zeros(2, 4).double())]
    with pytest.raises(
        ValueError, match=r"'0' must be a type that curvlinops supports, got Conv1d"
    ):
        to_kfac_operator(kronecker_factors(model, nn.MSELoss(), data), model)


def test_other_versions_of_curvlinops(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, model = curvature(1)
    monkeypatch.delattr(curvlinops.KFACLinearOperator, "_SUPPORTED_MODULES")
    with pytest.raises(ImportError, match=r"needs version 3 of curvlinops.*`CurvatureOperator`"):
        to_kfac_operator(ours, model)

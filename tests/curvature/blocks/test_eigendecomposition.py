"""Eigendecompositions of factors for which a driver fails or returns NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.blocks.eigen import eigendecomposition


def factors(groups: int = 3, size: int = 60, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return second moments ``[g, d, d]`` of inputs of which most are always zero."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(groups, 64, size, generator=generator, dtype=torch.float64)
    x *= torch.rand(groups, 1, size, generator=generator) < 0.2
    return (x.mT @ x / 64).to(dtype)


def check(factor: Tensor, rtol: float) -> None:
    values, vectors = (part.double() for part in eigendecomposition(factor))
    exact = factor.double()
    scale = exact.abs().amax()
    torch.testing.assert_close(
        vectors * values[:, None] @ vectors.mT / scale, exact / scale, rtol=0, atol=rtol
    )
    eye = torch.eye(factor.shape[-1], dtype=torch.float64).expand_as(exact)
    torch.testing.assert_close(vectors.mT @ vectors, eye, rtol=0, atol=rtol)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1.0, 1e30, 1e35])
@pytest.mark.parametrize("seed", range(5))
def test_factors_with_rows_of_zeros(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    x = torch.zeros(64, 100, dtype=torch.float64)
    x[:, torch.randperm(100)[:10]] = torch.randn(64, 10, dtype=torch.float64)
    check((scale * x.T @ x / 64).float()[None], 1e-5 if scale > 1e-35 else 1e-2)


@pytest.mark.parametrize("how", ["nan", "error"])
def test_a_driver_that_fails_in_float32_is_replaced(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = torch.linalg.eigh

    def failing(matrix: Tensor) -> Any:
        if matrix.dtype == torch.float64:
            return driver(matrix)
        if how == "error":
            raise RuntimeError("failed to converge")
        values, vectors = driver(matrix)
        values[1], vectors[1, 2, 0] = torch.nan, torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    dense = factors() + torch.eye(60)
    check(dense, 1e-5)
    expected = [driver(dense)[0][index] for index in (0, 2)]
    if how == "nan":  # the other matrices of the batch are those of the driver
        found = eigendecomposition(dense)[0]
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[2], expected[1])


@pytest.mark.parametrize("how", ["nan", "error"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_driver_that_fails_for_rows_of_zeros_is_called_without_them(
    dtype: torch.dtype, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = torch.linalg.eigh

    def failing(matrix: Tensor) -> Any:
        values, vectors = driver(matrix)
        zeros = (matrix == 0).all(-1).any(-1)
        if how == "error" and bool(zeros.any()):
            raise RuntimeError("failed to converge")
        values[zeros] = torch.nan
        return values, vectors

    monkeypatch.setattr(torch.linalg, "eigh", failing)
    dense = factors(dtype=dtype)
    dense[1], dense[2, 3, 3] = 0, 1.0  # no row at all, and other rows than those of the first
    check(dense, 1e-5)
    values = eigendecomposition(dense)[0]
    assert torch.equal(values, values.sort()[0])
    assert not values[1].any()


def test_a_failure_in_float64_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.linalg, "eigh", lambda m: (torch.full(m.shape[:2], torch.nan), torch.zeros_like(m))
    )
    with pytest.raises(RuntimeError, match="of the factor A of w must be finite"):
        eigendecomposition(factors(), "the factor A of w")


def test_a_factor_that_is_not_finite_is_an_error() -> None:
    broken = factors()
    broken[1, 0, 0] = torch.nan
    with pytest.raises(RuntimeError, match="The entries of a factor must be finite"):
        eigendecomposition(broken)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_decomposed_in_float32(dtype: torch.dtype) -> None:
    values, vectors = eigendecomposition(factors(dtype=dtype))
    assert values.dtype == vectors.dtype == dtype
    check(factors(dtype=dtype), 3e-2)


@pytest.mark.parametrize("seed", range(6))
def test_log_determinants_and_inverses_of_constant_inputs(seed: int) -> None:
    torch.manual_seed(seed)
    x, y = torch.zeros(64, 100), torch.randint(3, (64,))
    x[:, torch.randperm(100)[:10]] = torch.randn(64, 10)
    model = nn.Sequential(nn.Linear(100, 16), nn.ReLU(), nn.Linear(16, 3))
    found = kronecker_factors(model, nn.CrossEntropyLoss(), [(x, y)])
    dense = torch.block_diag(*(own.to_dense()[0].double() for own in found.values()))
    damped = dense + 0.1 * torch.eye(len(dense), dtype=torch.float64)
    torch.testing.assert_close(
        found.logdet(0.1).double(), torch.logdet(damped), rtol=1e-4, atol=1e-4
    )
    vector = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for name, solved in found.solve(vector, 0.1).items():
        assert solved.isfinite().all(), name

"""What the factors promise beyond their value: dtypes, layouts, symmetry, errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from torch.nn import functional

from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    explain,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.curvature.factors.choice import ALGORITHMS, applicable, choose
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import conv_geometry

SINGLE = {"rtol": 1e-4, "atol": 1e-4}
DOUBLE = {"rtol": 1e-10, "atol": 1e-10}
APPROXIMATIONS = ("expand", "reduce")
WINDOWED = ("lags", "correlations", "bands", "rows", "grams", "im2col")


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("algorithm", WINDOWED)
def test_agrees_with_torch_unfold(algorithm: str) -> None:
    x = draw(3, 4, 9, 8)
    options = {"stride": (2, 1), "padding": (1, 2), "dilation": (1, 2)}
    a = functional.unfold(x, (3, 2), **options)
    expected = torch.einsum("nas,nbs->ab", a, a)[None] / 3
    got = conv_input_factor(x, (3, 2), **options, algorithm=algorithm)
    torch.testing.assert_close(got, expected, **DOUBLE)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
@pytest.mark.parametrize("case", [c for c in CONV_CASES if len(c.input_size) > 1], ids=case_id)
def test_agrees_with_einconv(case: ConvCase, approximation: str) -> None:
    name = "convNd_kfc" if approximation == "expand" else "convNd_kfac_reduce"
    x, options = case.input(torch.float32), dict(case.options)
    module = pytest.importorskip(f"einconv.expressions.{name}")
    try:
        equation, operands, shape = module.einsum_expression(x, case.kernel_size, **options)
        expected = torch.einsum(equation, *operands).reshape(shape)
    except (RuntimeError, ValueError):
        pytest.skip("einconv runs out of letters or mixes dtypes")
    got = conv_input_factor(x, case.kernel_size, **options, approximation=approximation)
    torch.testing.assert_close(got, expected, **SINGLE)


@pytest.mark.parametrize("groups", [1, 2])
def test_agrees_with_the_weight_gradient_of_squares(groups: int) -> None:
    """``tr(W A W^T)`` is the mean squared output: torch's convolution as the oracle."""
    x, weight = draw(5, 4, 7, 6), draw(6, 4 // groups, 3, 3)
    options: dict[str, Any] = {"stride": 2, "padding": 1, "groups": groups}
    a = conv_input_factor(x, 3, **options)
    w = weight.reshape(groups, 6 // groups, -1)
    squares = functional.conv2d(x, weight, **options).square().sum() / 5
    torch.testing.assert_close((w @ a @ w.mT).diagonal(0, 1, 2).sum(), squares, **DOUBLE)
    x, weight = draw(5, 4, 4, 3), draw(4, 6 // groups, 3, 3)
    a = conv_transpose_input_factor(x, 3, output_padding=1, **options)
    w = weight.reshape(groups, 4 // groups, 6 // groups, 9)  # g ci co k
    w = w.transpose(1, 2).flatten(2)
    output = functional.conv_transpose2d(x, weight, output_padding=1, **options)
    got = (w @ a @ w.mT).diagonal(0, 1, 2).sum()
    torch.testing.assert_close(got, output.square().sum() / 5, **DOUBLE)


@pytest.mark.parametrize("algorithm", [*WINDOWED, None])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_single_precision(dtype: torch.dtype, algorithm: str | None) -> None:
    x = draw(4, 6, 9, 9).to(dtype)
    approximation = "expand" if algorithm else "reduce"
    options = {"padding": 1, "bias": True, "approximation": approximation}
    got = conv_input_factor(x, 3, **options, algorithm=algorithm)
    assert got.dtype == torch.float32
    expected = conv_input_factor(x.double(), 3, **options)
    torch.testing.assert_close(got.double(), expected, **SINGLE)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_factors_accumulate_in_single_precision(dtype: torch.dtype) -> None:
    g = draw(2, 3, 8, 5).to(dtype)
    for approximation in APPROXIMATIONS:
        for function in (output_factor, conv_output_factor):
            got = function(g, approximation=approximation)
            assert got.dtype == torch.float32
            expected = function(g.double(), approximation=approximation)
            torch.testing.assert_close(got.double(), expected, **SINGLE)
        got = linear_input_factor(g[0], approximation, bias=True)
        expected = linear_input_factor(g[0].double(), approximation, bias=True)
        torch.testing.assert_close(got.double(), expected, **SINGLE)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_layout_does_not_matter(approximation: str, kernel: int) -> None:
    x = draw(4, 6, 20, 20)
    wide = draw(4, 12, 20, 20)
    wide[:, ::2] = x
    layouts = [x.to(memory_format=torch.channels_last), wide[:, ::2], x.mT.contiguous().mT]
    for groups in (1, 3):
        options = {"groups": groups, "approximation": approximation, "bias": True}
        expected = conv_input_factor(x, kernel, **options)
        for layout in layouts:
            got = conv_input_factor(layout, kernel, **options)
            torch.testing.assert_close(got, expected, **DOUBLE)


@pytest.mark.parametrize("algorithm", WINDOWED)
@pytest.mark.parametrize("groups", [1, 5])
def test_symmetric_definite_and_repeatable(algorithm: str, groups: int) -> None:
    if algorithm == "rows" and groups > 1:
        pytest.skip("rows are for one group")
    x = draw(3, *((20, 4, 5) if algorithm == "grams" else (150, 8, 7)), dtype=torch.float32)
    a = conv_input_factor(x, 3, 1, 1, groups=groups, algorithm=algorithm)
    assert torch.equal(a, a.mT)
    assert torch.equal(a, conv_input_factor(x, 3, 1, 1, groups=groups, algorithm=algorithm))
    eigenvalues = torch.linalg.eigvalsh(a.double())
    assert eigenvalues.min() > -1e-6 * eigenvalues.max()


def test_symmetric_with_many_regions() -> None:
    """Sums of so many channels and regions that parts of them are added in other orders."""
    x = draw(2, 24, 16, 16, dtype=torch.float32)
    for algorithm in ("lags", "bands"):
        a = conv_input_factor(x, 7, 1, 3, groups=24, algorithm=algorithm)
        assert torch.equal(a, a.mT)


@pytest.mark.parametrize("approximation", APPROXIMATIONS)
def test_duplicated_batch(approximation: str) -> None:
    x = draw(3, 2, 6, 5)
    options = {"padding": 1, "bias": True, "approximation": approximation}
    expected = conv_input_factor(x, 3, **options)
    got = conv_input_factor(torch.cat([x, x]), 3, **options)
    torch.testing.assert_close(got, expected, **DOUBLE)


def test_beta_zero_ignores_what_was_there() -> None:
    x = draw(2, 3, 5, 5)
    expected = conv_input_factor(x, 2, bias=True)
    for algorithm in WINDOWED:
        out = torch.full_like(expected, torch.nan)
        conv_input_factor(x, 2, bias=True, algorithm=algorithm, out=out)
        torch.testing.assert_close(out, expected, **DOUBLE)


X = torch.zeros(2, 4, 5, 5)
ERRORS: list[tuple[dict[str, Any], str]] = [
    ({"approximation": "KFC"}, "`approximation` must be one of .*, got 'KFC'"),
    ({"algorithm": "fast"}, "`algorithm` must be one of .*, got 'fast'"),
    ({"algorithm": "pointwise"}, "`algorithm` must be one of .*, got 'pointwise'"),
    ({"algorithm": "lags", "approximation": "reduce"}, "`algorithm` must be None for 'reduce'"),
    ({"groups": 3}, "`channels` must be divisible by groups=3, got 4"),
    ({"kernel_size": 7}, "`kernel_size` must fit"),
    ({"padding": "same", "stride": 2}, "`padding`='same' must come with stride 1"),
    ({"beta": 0.9}, "`beta` must be 0 without `out`, got 0.9"),
    ({"out": torch.zeros(1, 16, 15)}, "`out` must be contiguous of shape .1, 16, 16."),
    ({"out": torch.zeros(1, 16, 32)[..., ::2]}, "`out` must be contiguous"),
    ({"out": torch.zeros(1, 16, 16).double()}, "`out` must be torch.float32 on cpu"),
    ({"x": X[:0]}, "non-empty batch"),
    ({"x": X.long()}, "real floating-point"),
    ({"x": X.to(torch.complex64)}, "real floating-point"),
]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        conv_input_factor(**{"x": X, "kernel_size": 2, **arguments})


def test_output_factor_errors() -> None:
    with pytest.raises(ValueError, match=r"`g` must have shape \[V, N, S, C_out\]"):
        output_factor(X[0])
    with pytest.raises(ValueError, match="divisible by groups=2"):
        conv_output_factor(torch.zeros(1, 2, 3), groups=2)
    with pytest.raises(ValueError, match="non-empty"):
        conv_output_factor(torch.zeros(1, 0, 3))


def test_explain_names_the_choice_first() -> None:
    lines = explain((8, 64, 56, 56), 3, padding=1).splitlines()
    geometry = conv_geometry((56, 56), 3, padding=1)
    problem = Problem(geometry, 8, 64, torch.float32, "cpu")
    assert lines[1].split()[0] == choose(problem)
    assert {line.split()[0] for line in lines[1:]} == set(applicable(problem))
    assert set(ALGORITHMS) - {"grams", "pointwise", "fused"} <= set(applicable(problem))
    assert explain((8, 64, 56, 56), 1).splitlines()[1].startswith("pointwise")
    assert explain((8, 64, 28, 28), 7, groups=64, device="cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 7, 1), (9, 130, 1, 1), (2, 3, 1, 1, 1), (70, 200, 1, 1)])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_one_position(shape: tuple[int, ...], approximation: str, dtype: torch.dtype) -> None:
    """Layers whose factor is one small product, new and added to an old one."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    rows = x.flatten(1).double()
    expected = (rows.T @ rows / len(x)).unsqueeze(0)
    got = conv_input_factor(x, 1, approximation=approximation)
    assert got.dtype == dtype
    assert torch.equal(got, got.mT)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    for beta in (0.0, 0.5):
        old = torch.full_like(got, torch.nan) if beta == 0 else torch.ones_like(got)
        out = conv_input_factor(x, 1, approximation=approximation, out=old, beta=beta, alpha=2.0)
        assert out is old
        assert torch.equal(out, out.mT)
        torch.testing.assert_close(out.double(), beta + 2 * expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="`out` must be contiguous"):
        conv_input_factor(x, 1, approximation=approximation, out=got[:, 1:, 1:])
    with pytest.raises(ValueError, match="`beta` must be 0 without `out`"):
        conv_input_factor(x, 1, approximation=approximation, beta=0.5)


@pytest.mark.parametrize("stride", [10**6, 2**30])
@pytest.mark.parametrize("make", [conv_input_factor, conv_transpose_input_factor])
def test_a_stride_costs_nothing(make: Any, stride: int) -> None:
    """With one output, every stride gives the factor of the smallest."""
    if make is conv_transpose_input_factor:
        x, near = torch.rand(2, 4, 1, 1), 2
    else:
        x, near = torch.rand(2, 4, 6, 7), 6
    found = make(x, 2, stride=stride, padding=0, groups=2)
    torch.testing.assert_close(found, make(x, 2, stride=near, padding=0, groups=2))

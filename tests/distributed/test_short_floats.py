"""Factors that are sent in a data type of fewer bits: rounded twice, and the same on all."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from optim_cases import conv_net
from short_float_cases import DTYPES, TRAININGS
from torch import Tensor, nn
from worker_processes import run_workers

from einconv_kfac import KFAC, KFACPreconditioner

SIZE = 3
ROUNDINGS = 2
MARGIN = 1.01
"""For second orders."""
EXACT = 1e-12
DIVISIONS = False, True


@pytest.fixture(scope="module")
def found() -> dict[int, list[Any]]:
    """What each worker found."""
    return run_workers("short_float_cases.short", 1, SIZE)


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of rounding."""
    return torch.finfo(dtype).eps / 2


def roots(factor: Tensor) -> Tensor:
    """The roots of products of diagonal entries, which bound a matrix."""
    diagonal = factor.diagonal(dim1=-2, dim2=-1).sqrt()
    return diagonal[..., None] * diagonal[..., None, :]


@pytest.mark.parametrize("divides", DIVISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_are_rounded_twice(dtype: torch.dtype, divides: bool, found: Any) -> None:
    expected = found[1][0]["factors, None, False"]
    errors = []
    for own in found[SIZE]:
        for factor, exact in zip(own[f"factors, {dtype}, {divides}"], expected):
            bound = roots(exact)
            assert torch.equal(factor, factor.mT)
            errors.append(float(((factor - exact).abs() / bound).nan_to_num().max()))
            diagonals = (own.diagonal(dim1=-2, dim2=-1) for own in (factor, exact))
            torch.testing.assert_close(*diagonals, rtol=EXACT, atol=0.0)
            lowest = torch.linalg.eigvalsh(factor / bound.nan_to_num(1.0).clamp_min(1e-300)).min()
            assert lowest > -ROUNDINGS * unit(dtype) * factor.shape[-1]
    assert unit(dtype) / 100 < max(errors) < MARGIN * ROUNDINGS * unit(dtype)


@pytest.mark.parametrize("divides", DIVISIONS)
def test_by_default_nothing_is_rounded(divides: bool, found: Any) -> None:
    expected = found[1][0]["factors, None, False"]
    for own in found[SIZE]:
        for factor, exact in zip(own[f"factors, None, {divides}"], expected):
            assert float(((factor - exact).abs() / roots(exact)).nan_to_num().max()) < EXACT


@pytest.mark.parametrize("divides", DIVISIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_worker_rounds_nothing(dtype: torch.dtype, divides: bool, found: Any) -> None:
    (own,) = found[1]
    for name in ("factors", "squares"):
        for one, other in zip(own[f"{name}, {dtype}, {divides}"], own[f"{name}, None, False"]):
            assert torch.equal(one, other)


@pytest.mark.parametrize("divides", DIVISIONS)
@pytest.mark.parametrize("dtype", [None, *DTYPES])
def test_squared_gradients_are_rounded_twice(dtype: Any, divides: bool, found: Any) -> None:
    expected = found[1][0]["squares, None, False"]
    bound = EXACT if dtype is None else MARGIN * ROUNDINGS * unit(dtype)
    for own in found[SIZE]:
        error = (own[f"squares, {dtype}, {divides}"] / expected - 1).abs().max()
        assert float(error) < bound


@pytest.mark.parametrize("name", TRAININGS)
def test_all_workers_have_the_same_to_the_bit(name: str, found: Any) -> None:
    first, *others = (own[name] for own in found[SIZE])
    for other in others:
        assert all(torch.equal(numbers, other[key]) for key, numbers in first.items())


@pytest.mark.parametrize("name", TRAININGS)
def test_loaded_states_go_on_bit_by_bit(name: str, found: Any) -> None:
    for own in found[SIZE]:
        assert torch.equal(own[name]["loaded"], own[name]["whole"])


def test_workers_with_other_data_types_are_refused(found: Any) -> None:
    for own in found[SIZE]:
        assert (
            "same `communication_dtype`, got 'torch.bfloat16' on worker 0 and 'torch.float16' on "
            "worker 1." in own["differing"]
        )


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
@pytest.mark.parametrize("value", [torch.int8, torch.complex64, torch.float8_e4m3fn, "float16", 16])
def test_other_data_types_are_refused(value: Any, kind: Any) -> None:
    message = "`communication_dtype` must be None or one of torch.float16, torch.bfloat16, .*, got "
    with pytest.raises(ValueError, match=message):
        kind(conv_net(), nn.CrossEntropyLoss(), communication_dtype=value)


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_copies_keep_the_data_type(kind: Any) -> None:
    opt = kind(conv_net(), nn.CrossEntropyLoss(), communication_dtype=torch.float16)
    _, (_, given, *_), *_ = copy.deepcopy(opt).__reduce__()
    assert given["communication_dtype"] is torch.float16

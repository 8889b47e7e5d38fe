"""Choices by a flag on the device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from einconv_kfac.optim.factors.finiteness import Finiteness
from einconv_kfac.optim.step.selection import or_others, or_zero

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]
DTYPES += [torch.complex128]


def tensors(dtype: torch.dtype) -> list[Tensor]:
    """Return tensors of several forms, among them numbers that are not finite."""
    torch.manual_seed(0)
    found = [torch.randn(3, 2), torch.randn(2, 3, 4, 5), torch.randn(()), torch.randn(0)]
    found = [each.to(dtype) for each in found]
    found[1] = found[1].to(memory_format=torch.channels_last)
    found[0][0, 0], found[0][1, 1], found[0][2, 0] = torch.nan, torch.inf, -torch.inf
    return found


def finite(number: float) -> Finiteness:
    """Return whether a number is finite."""
    return Finiteness({}, lambda: [torch.tensor(1.0), torch.tensor(number)])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("number", [2.0, torch.nan, torch.inf, -torch.inf])
def test_a_choice_is_torch_where(dtype: torch.dtype, number: float) -> None:
    given = tensors(dtype)
    others = [torch.full_like(each, 2.0) for each in given]
    known, flag = finite(number), torch.tensor(number == 2)
    for own, old, found in zip(given, others, or_others(given, others, known)):
        assert found.dtype == dtype
        expected = torch.where(flag, own, old)
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
    for own, found in zip(given, or_zero(given, known)):
        expected = torch.where(flag, own, torch.zeros_like(own))
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_several_types_are_chosen_at_once() -> None:
    given = [*tensors(torch.float32), *tensors(torch.float64), *tensors(torch.float32)]
    found = or_zero(given, finite(0.0))
    for own, each in zip(given, found):
        torch.testing.assert_close(each, own, rtol=0, atol=0, equal_nan=True)
        assert each is not own

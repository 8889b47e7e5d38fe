"""The weight VJP of small images with many channels against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cases import ConvCase
from drawn_cases import conv_cases
from hypothesis import given, settings
from oracles import reference
from torch import Tensor

from einconv_kfac.evaluate import contract_convolution
from einconv_kfac.evaluate.kernels import columns


def pulled_back(case: ConvCase) -> Tensor:
    """The weight VJP by torch."""
    x, weight = case.input(), case.weight()
    _, pullback = torch.func.vjp(lambda w: reference(x, w, case.geometry), weight)
    result: Tensor = pullback(case.output_like())[0]
    return result


@settings(max_examples=50)
@given(conv_cases())
def test_drawn_geometries(case: ConvCase) -> None:
    channels = case.in_channels // case.groups
    case = replace(case, in_channels=channels, options={**case.options, "groups": 1})
    result = columns.weight_vjp(case.geometry, case.input(), case.output_like())
    torch.testing.assert_close(result, pulled_back(case))


@pytest.mark.parametrize("size", [3, 5])
@pytest.mark.parametrize("chunk", [1, columns.WINDOWS_BYTES_PER_THREAD])
@pytest.mark.parametrize("batch", [0, 1, 3])
def test_chunks(size: int, chunk: int, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "WINDOWS_BYTES_PER_THREAD", chunk)
    options = {"padding": 1, "stride": size - 2}
    case = ConvCase(
        "many", columns.WINDOWS_MIN_CHANNELS, 2, (4, size), (3, size - 1), options, batch
    )
    assert columns.pays(case.geometry, case.input())
    result = contract_convolution(case.geometry, "w", case.input(), case.output_like())
    torch.testing.assert_close(result, pulled_back(case))


def test_few_channels_large_windows_and_groups_do_not_pay() -> None:
    many = ConvCase("many", columns.WINDOWS_MIN_CHANNELS, 2, (4, 4), (3, 3))
    assert columns.pays(many.geometry, many.input())
    for other in [
        replace(many, in_channels=columns.WINDOWS_MIN_CHANNELS - 1),
        replace(many, options={"groups": 2}),
        replace(many, options={"stride": 3}),
        replace(many, input_size=(90, 90)),
    ]:
        assert not columns.pays(other.geometry, other.input())

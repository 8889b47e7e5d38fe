"""Functionals against torch's own."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from oracles import CONVOLUTIONS
from torch.nn import functional

from einconv_kfac.functionals import convNd, unfoldNd

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own
ALL_CASES = pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])


@ALL_CASES
@SIMPLIFY
def test_convolution_equals_torch(case: ConvCase, simplify: bool) -> None:
    x, weight = case.input(), case.weight()
    bias = torch.linspace(-1, 1, case.out_channels, dtype=torch.float64)
    expected = CONVOLUTIONS[len(case.input_size)](x, weight, bias, **case.options)
    torch.testing.assert_close(convNd(x, weight, bias, **case.options, simplify=simplify), expected)
    torch.testing.assert_close(convNd(x[0], weight, bias, **case.options), expected[0])


@pytest.mark.parametrize("case", [c for c in CONV_CASES if len(c.input_size) == 2], ids=case_id)
def test_unfold_equals_torch(case: ConvCase) -> None:
    x, geometry = case.input(), case.geometry
    padded = functional.pad(x, [side for sides in reversed(geometry.padding) for side in sides])
    keywords = {"stride": geometry.stride, "dilation": geometry.dilation}
    expected = functional.unfold(padded, case.kernel_size, **keywords)
    torch.testing.assert_close(unfoldNd(x, case.kernel_size, **case.ungrouped), expected)

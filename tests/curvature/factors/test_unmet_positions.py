"""Positions that no window meets, which torch's convolutions ignore whatever is there."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.factors import conv_input_factor, conv_transpose_input_factor
from einconv_kfac.curvature.factors.indices.runs import unmet

Options = dict[str, int]
CONVOLUTIONS: list[tuple[tuple[int, ...], Options]] = [
    ((7,), {"kernel_size": 2, "stride": 3}),
    ((200,), {"kernel_size": 2, "stride": 3}),
    ((8,), {"kernel_size": 1, "stride": 3}),
    ((8, 9), {"kernel_size": 2, "stride": 2}),
    ((10, 9), {"kernel_size": 3, "stride": 4}),
    ((40, 39), {"kernel_size": 3, "stride": 4}),
    ((11, 11), {"kernel_size": 2, "stride": 3, "dilation": 3}),
    ((13, 12), {"kernel_size": 3, "stride": 4, "padding": 1}),
    ((9, 8), {"kernel_size": 2, "stride": 3, "groups": 2}),
    ((5, 7, 9), {"kernel_size": 2, "stride": 3}),
]
TRANSPOSED: list[tuple[tuple[int, ...], Options]] = [
    ((7,), {"kernel_size": 3, "padding": 4}),
    ((6, 6), {"kernel_size": 2, "padding": 3}),
    ((6, 6), {"kernel_size": 2, "stride": 2, "padding": 4}),
    ((6,), {"kernel_size": 3, "stride": 2, "padding": 5, "dilation": 2}),
]
ALGORITHMS = (None, "bands", "correlations", "grams", "im2col", "lags", "pointwise", "rows")
FUNCTIONS: Any = {
    False: {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d},
    True: {1: functional.conv_transpose1d, 2: functional.conv_transpose2d},
}
FACTORS = {False: conv_input_factor, True: conv_transpose_input_factor}
CASES = [(False, *case) for case in CONVOLUTIONS] + [(True, *case) for case in TRANSPOSED]


def is_met(transposed: bool, shape: tuple[int, ...], options: Options) -> Tensor:
    """Whether torch's convolution depends on a position of the input."""
    given = {
        name: value for name, value in options.items() if name not in {"kernel_size", "groups"}
    }
    x = torch.zeros(1, 1, *shape, requires_grad=True)
    weight = torch.ones(1, 1, *[options["kernel_size"]] * len(shape))
    y = FUNCTIONS[transposed][len(shape)](x, weight, **given)
    return torch.autograd.grad(y.sum(), x)[0][0, 0] > 0


def applies(factor: Any, x: Tensor, given: Any) -> bool:
    """Whether an algorithm can compute a factor."""
    try:
        factor(x, **given)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("transposed", "shape", "options"), CASES)
def test_factors_ignore_positions_that_no_window_meets(
    transposed: bool, shape: tuple[int, ...], options: Options
) -> None:
    met, factor = is_met(transposed, shape, options), FACTORS[transposed]
    assert not met.all()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *shape, dtype=torch.float64, generator=generator)
    inputs = [torch.where(met, x, value) for value in (0.0, torch.nan, torch.inf)]
    if len(shape) == 2:
        inputs.append(inputs[1].contiguous(memory_format=torch.channels_last))
    for approximation, bias, algorithm in product(("expand", "reduce"), (False, True), ALGORITHMS):
        given: Any = {**options, "approximation": approximation, "bias": bias}
        if approximation == "expand":
            given["algorithm"] = algorithm
        if algorithm is not None and not applies(factor, inputs[0], given):
            continue
        want, *got = (factor(each, **given) for each in inputs)
        for each in got:
            torch.testing.assert_close(each, want)


def test_unmet_positions_are_slices() -> None:
    entries = ((0,), (), (), (0,), (), (), (0,), ())
    found = {i for part in unmet(entries) for i in range(len(entries))[part]}
    assert found == {1, 2, 4, 5, 7}

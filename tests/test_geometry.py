"""Geometry against torch's own sizes, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import CONV_CASES, ConvCase, case_id
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import CONVOLUTIONS, TRANSPOSED

from einconv_kfac.geometry import (
    Axis,
    Geometry,
    conv_geometry,
    conv_transpose_geometry,
    output_padding_of,
)

pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch's own


@pytest.mark.parametrize("case", CONV_CASES, ids=case_id)
def test_sizes_equal_torch(case: ConvCase) -> None:
    convolve = CONVOLUTIONS[len(case.input_size)]
    output = convolve(case.input(), case.weight(), **case.options)
    assert case.geometry.output_size == tuple(output.shape[2:])
    assert case.geometry.positions == output[0, 0].numel()
    for axis in case.geometry.axes:
        for kernel in range(axis.kernel_size):
            met = [
                o
                for o in range(axis.output_size)
                if 0 <= axis.input_position(kernel, o) < axis.input_size
            ]
            assert list(axis.outputs(kernel)) == met


@settings(derandomize=True, database=None, max_examples=80, deadline=None)
@given(*[st.integers(1, 4)] * 4, st.integers(0, 3), st.integers(0, 3))
def test_transposed_sizes_equal_torch(
    size: int, kernel: int, stride: int, dilation: int, padding: int, extra: int
) -> None:
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation}
    x, weight = torch.ones(1, 1, size), torch.ones(1, 1, kernel)
    try:
        geometry = conv_transpose_geometry((size,), kernel, **options, output_padding=extra)
    except ValueError:
        with pytest.raises(RuntimeError):
            TRANSPOSED[1](x, weight, **options, output_padding=extra)
        return
    output = TRANSPOSED[1](x, weight, **options, output_padding=extra)
    assert geometry.input_size == tuple(output.shape[2:])
    assert geometry.output_size == (size,)
    assert output_padding_of(geometry.input_size, (size,), kernel, **options) == (extra,)


def test_spellings_agree() -> None:
    plain = conv_geometry((8, 8), (3, 3), (2, 2), ((1, 1), (1, 1)), (1, 1))
    assert conv_geometry((8, 8), 3, 2, 1) == plain
    assert conv_geometry([8, 8], [3, 3], [2], [1, 1], [1, 1]) == plain
    assert conv_geometry((8,), 4, padding="same").padding == ((1, 2),)
    assert conv_geometry((8,), 4, padding="valid").padding == ((0, 0),)
    assert hash(plain) == hash(conv_geometry((8, 8), 3, 2, 1))


ERRORS: list[tuple[Any, str]] = [
    (lambda: Axis(0, 1), "`input_size` must be at least 1, got 0"),
    (lambda: Axis(3, 1, padding=(-1, 0)), "`padding` must not be negative"),
    (lambda: Axis(3, 4), "`kernel_size` must fit into the padded input"),
    (lambda: Geometry((), 0), "`groups` must be at least 1, got 0"),
    (lambda: conv_geometry((8,), 3, padding=(1, 2)), "`padding` must have one entry per dimension"),
    (
        lambda: conv_geometry((8,), 3, padding="SAME"),
        "`padding` must be 'same', 'valid' or numbers",
    ),
    (
        lambda: Axis(8, 3, padding=(2**30, 2**30)),
        "`padding` must leave at most 2147483647 ",
    ),
    (lambda: conv_geometry((8, 8), 3, padding=2**29), "at most 281474976710656 output positions"),
    (lambda: conv_geometry((2**30, 2**30), 3), "must have at most 281474976710656 input positions"),
    (lambda: conv_geometry((8,), 3, padding=2**70), "`padding` must be at most 2147483647"),
    (lambda: conv_geometry((8,), 3, stride=(2**31,)), "`stride` must be at most 2147483647"),
    (lambda: conv_geometry((8,), 2**63), "`kernel_size` must be at most 2147483647"),
    (lambda: conv_geometry((8,), 3, groups=2**70), "`groups` must be at most 2147483647"),
    (
        lambda: conv_transpose_geometry((8,), 3, stride=2**30),
        "`stride` and `kernel_size` must leave at most 2147483647 output positions",
    ),
    (lambda: conv_geometry((8,), 3, groups=2).split_channels(3), "divisible by groups=2, got 3"),
]


@pytest.mark.parametrize(("call", "message"), ERRORS)
def test_errors_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()

"""Convolutions that Hypothesis draws, for tests that hold for all of them."""

from __future__ import annotations

from cases import ConvCase
from hypothesis import strategies as st

LARGEST = {1: (4, 3, 4, 6), 2: (3, 3, 2, 3), 3: (2, 2, 1, 1)}
"""Kernel, stride and dilation, padding, and positions beyond the kernel, per dimension."""


@st.composite
def conv_cases(draw: st.DrawFn) -> ConvCase:
    """A small convolution in one to three dimensions, with other numbers along each."""
    ndim = draw(st.integers(1, 3))
    most, step, side, room = LARGEST[ndim]

    def along_each(largest: int, smallest: int = 1) -> tuple[int, ...]:
        numbers = st.integers(smallest, largest)
        return tuple(draw(st.tuples(*[numbers] * ndim)))

    kernel, stride, dilation = along_each(most), along_each(step), along_each(step)
    padding = tuple(zip(along_each(side, 0), along_each(side, 0)))
    spans = [(k - 1) * d + 1 - sum(p) for k, d, p in zip(kernel, dilation, padding)]
    size = tuple(max(1, span) + more for span, more in zip(spans, along_each(room, 0)))
    groups, ci, co = (draw(st.integers(1, 2)) for _ in range(3))
    options = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    return ConvCase("drawn", groups * ci, groups * co, size, kernel, options, 2)

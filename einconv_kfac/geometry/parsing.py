"""Convolutions from torch's spellings of their hyper-parameters."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from einconv_kfac.geometry.axis import Axis
from einconv_kfac.geometry.geometry import Geometry
from einconv_kfac.geometry.spellings import (
    Padding,
    Sizes,
    as_sizes,
    hashable,
    parse_padding,
    same_padding,
    window_sizes,
)


def conv_geometry(
    input_size: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Geometry:
    """Return a convolution given in torch's spellings.

    Args:
        input_size: Input positions per dimension; its length is the number of dimensions.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Stride, one number or one per dimension.
        padding: A number, one number or ``(left, right)`` pair per dimension, ``"valid"``
            (none) or ``"same"`` (output as large as the input; if the total is odd, the larger
            half is on the right).
        dilation: Dilation, one number or one per dimension.
        groups: Number of channel groups.

    Raises:
        ValueError: If a number is out of range, there is not one per dimension, the kernel
            does not fit, or the padding is ``"same"`` and a stride is not 1.
        TypeError: If a hyper-parameter is not an integer.

    >>> conv_geometry((32, 28), kernel_size=3, stride=(2, 1), padding=1).output_size
    (16, 28)
    """
    options = (input_size, kernel_size, stride, padding, dilation, groups)
    return cached_geometry(*map(hashable, options))


def parse_geometry(
    input_size: Sequence[int], kernel_size: Sizes, stride: Sizes = 1, padding: Padding = 0,
    dilation: Sizes = 1, groups: int = 1,
) -> Geometry:  # fmt: skip
    """Return the convolution of `conv_geometry` without a cache, as graph tracing requires."""
    sizes = as_sizes(input_size, "input_size")
    ndim = len(sizes)
    kernel, strides, steps = window_sizes(kernel_size, stride, dilation, ndim)
    word = padding if isinstance(padding, str) else None
    if word == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"`padding`='same' must come with stride 1, got stride {stride!r}.")
        sides = same_padding(kernel, steps, ndim)
    elif word == "valid":
        sides = ((0, 0),) * ndim
    else:
        sides = parse_padding(padding, ndim)
    return Geometry(tuple(Axis(*a) for a in zip(sizes, kernel, strides, sides, steps)), groups)


cached_geometry = lru_cache(maxsize=4096)(parse_geometry)

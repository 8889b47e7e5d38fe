"""Transposed convolutions, given by the convolutions whose adjoints they are."""

from __future__ import annotations

from collections.abc import Sequence

from einconv_kfac.geometry.axis import Axis
from einconv_kfac.geometry.geometry import Geometry
from einconv_kfac.geometry.spellings import (
    LARGEST_SIZE,
    Padding,
    Sizes,
    as_sizes,
    parse_padding,
    per_dimension,
    window_sizes,
)


def conv_transpose_geometry(
    input_size: Sequence[int], kernel_size: Sizes, stride: Sizes = 1, padding: Padding = 0,
    output_padding: Sizes = 0, dilation: Sizes = 1, groups: int = 1,
) -> Geometry:  # fmt: skip
    """Return the convolution whose adjoint is the transposed convolution described.

    The transposed convolution maps that convolution's output (``input_size`` here) to its
    input, of size ``(O - 1) S - p_left - p_right + D (K - 1) + 1 + output_padding``.

    Raises:
        ValueError: As `conv_geometry`; also if ``output_padding`` is not smaller than the
            stride or the dilation, or if no output position remains.

    >>> conv_transpose_geometry((7,), kernel_size=3, stride=2, output_padding=1).input_size
    (16,)
    """
    sizes = as_sizes(input_size, "input_size")
    ndim = len(sizes)
    kernel, strides, steps = window_sizes(kernel_size, stride, dilation, ndim)
    extra = per_dimension(output_padding, ndim, "output_padding", minimum=0)
    sides = transposed_padding(padding, ndim)
    for e, s, d in zip(extra, strides, steps):
        if e >= max(s, d):
            raise ValueError(
                f"`output_padding` must be smaller than stride or dilation, got {e} with "
                f"stride {s} and dilation {d}."
            )
    least = _least_sizes(sizes, kernel, strides, sides, steps)
    targets = tuple(low + e for low, e in zip(least, extra))
    if any(target < 1 for target in targets):
        raise ValueError(
            f"`padding` must leave at least one output position, got {padding!r} for an "
            f"output of {targets}."
        )
    if any(target > LARGEST_SIZE for target in targets):
        raise ValueError(
            f"`stride` and `kernel_size` must leave at most {LARGEST_SIZE} output positions, got "
            f"{stride!r} and {kernel_size!r} for an output of {targets}."
        )
    # output padding beyond the stride would make room for further outputs of the convolution
    fixed = [(p[0], p[1] - max(0, e - s + 1)) for p, e, s in zip(sides, extra, strides)]
    return Geometry(tuple(Axis(*a) for a in zip(targets, kernel, strides, fixed, steps)), groups)


def output_padding_of(
    output_size: Sizes, input_size: Sequence[int], kernel_size: Sizes, stride: Sizes = 1,
    padding: Padding = 0, dilation: Sizes = 1,
) -> tuple[int, ...]:  # fmt: skip
    """Return the output padding for which a transposed convolution has an output size.

    Raises:
        ValueError: If it would be negative, or not smaller than the stride or the dilation;
            as `conv_geometry`.

    >>> output_padding_of(16, (7,), kernel_size=3, stride=2)
    (1,)
    """
    inputs = as_sizes(input_size, "input_size")
    ndim = len(inputs)
    sizes = per_dimension(output_size, ndim, "output_size")
    kernel, strides, steps = window_sizes(kernel_size, stride, dilation, ndim)
    sides = transposed_padding(padding, ndim)
    least = _least_sizes(inputs, kernel, strides, sides, steps)
    largest = tuple(low + max(s, d) - 1 for low, s, d in zip(least, strides, steps))
    if not all(low <= size <= high for low, size, high in zip(least, sizes, largest)):
        raise ValueError(
            f"`output_size` must be between {least} and {largest}, got {output_size!r}."
        )
    return tuple(size - low for size, low in zip(sizes, least))


def transposed_padding(padding: Padding, ndim: int) -> tuple[tuple[int, int], ...]:
    """Return the padding of a transposed convolution as ``(left, right)`` per dimension.

    Raises:
        ValueError: If it is ``"same"``, which has no meaning there; as `parse_padding`.
    """
    if isinstance(padding, str) and padding != "valid":
        raise ValueError(
            f"`padding` must be 'valid' or numbers for a transposed convolution, got {padding!r}."
        )
    return ((0, 0),) * ndim if isinstance(padding, str) else parse_padding(padding, ndim)


def _least_sizes(
    sizes: Sequence[int],
    kernel: Sequence[int],
    strides: Sequence[int],
    sides: Sequence[tuple[int, int]],
    steps: Sequence[int],
) -> tuple[int, ...]:
    """Return the output sizes of a transposed convolution without output padding."""
    return tuple(
        (o - 1) * s - sum(p) + d * (k - 1) + 1
        for o, k, s, p, d in zip(sizes, kernel, strides, sides, steps)
    )

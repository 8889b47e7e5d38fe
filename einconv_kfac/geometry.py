"""Which convolution: its hyper-parameters and sizes, as one frozen value.

A convolution is a set of independent *axes* (its spatial dimensions) and a number of
channel groups. Along one axis, input ``i`` meets kernel entry ``k`` for output ``o`` iff
``i = o * stride + k * dilation - left`` and ``0 <= i < input_size``. Everything else in
this package follows from that line. Nothing here knows about tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any, TypeAlias

Sizes: TypeAlias = int | Sequence[int]
Padding: TypeAlias = int | str | Sequence[int | tuple[int, int]]


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution.

    Args:
        input_size: Number of input positions ``I``.
        kernel_size: Number of kernel entries ``K``.
        stride: Step between the windows of neighbouring outputs.
        padding: Zeros added on the left and on the right; a negative number on the right drops
            the last outputs.
        dilation: Step between neighbouring kernel entries.

    Raises:
        ValueError: If a size is not positive, the padding is negative, or the dilated
            kernel does not fit into the padded input.
    """

    input_size: int
    kernel_size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    def __post_init__(self) -> None:
        for name in ("input_size", "kernel_size", "stride", "dilation"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.padding[0] < 0:
            raise ValueError(f"`padding` must not be negative, got {self.padding}.")
        if self.span > self.padded_size:
            raise ValueError(
                f"`kernel_size` must fit into the padded input: {self.kernel_size} entries with "
                f"dilation {self.dilation} span {self.span} positions, got an input of "
                f"{self.input_size} padded to {self.padded_size}."
            )

    @property
    def span(self) -> int:
        """Positions from the first to the last kernel entry, both included."""
        return (self.kernel_size - 1) * self.dilation + 1

    @property
    def padded_size(self) -> int:
        """Input positions with the padding on both sides."""
        return self.input_size + sum(self.padding)

    @property
    def output_size(self) -> int:
        """Number of output positions ``O``."""
        return 1 + (self.padded_size - self.span) // self.stride

    def input_position(self, kernel: int, output: int) -> int:
        """Input position that kernel entry ``kernel`` meets for ``output``; may be padding."""
        return output * self.stride + kernel * self.dilation - self.padding[0]

    def outputs(self, kernel: int) -> range:
        """Outputs for which kernel entry ``kernel`` meets an input that is not padding."""
        offset = kernel * self.dilation - self.padding[0]
        first = max(0, -(offset // self.stride))
        last = min(self.output_size - 1, (self.input_size - 1 - offset) // self.stride)
        return range(first, max(first, last + 1))


@dataclass(frozen=True)
class Geometry:
    """A convolution: its axes, outermost first, and its number of channel groups."""

    axes: tuple[Axis, ...]
    groups: int = 1

    def __post_init__(self) -> None:
        if self.groups < 1:
            raise ValueError(f"`groups` must be at least 1, got {self.groups}.")

    @property
    def ndim(self) -> int:
        """Number of spatial dimensions."""
        return len(self.axes)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Input positions per dimension."""
        return tuple(axis.input_size for axis in self.axes)

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Kernel entries per dimension."""
        return tuple(axis.kernel_size for axis in self.axes)

    @property
    def output_size(self) -> tuple[int, ...]:
        """Output positions per dimension."""
        return tuple(axis.output_size for axis in self.axes)

    @property
    def stride(self) -> tuple[int, ...]:
        """Stride per dimension."""
        return tuple(axis.stride for axis in self.axes)

    @property
    def dilation(self) -> tuple[int, ...]:
        """Dilation per dimension."""
        return tuple(axis.dilation for axis in self.axes)

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """Zeros added left and right, per dimension."""
        return tuple(axis.padding for axis in self.axes)

    @property
    def positions(self) -> int:
        """Number of output positions over all dimensions."""
        return prod(self.output_size)

    def split_channels(self, channels: int, name: str = "channels") -> int:
        """Return the channels per group.

        Raises:
            ValueError: If the groups do not divide the channels.
        """
        if channels % self.groups:
            raise ValueError(f"`{name}` must be divisible by groups={self.groups}, got {channels}.")
        return channels // self.groups


def per_dimension(value: Sizes, ndim: int, name: str, minimum: int = 1) -> tuple[int, ...]:
    """Spell ``value`` out as one integer per dimension.

    Raises:
        ValueError: If it has another length or an entry below ``minimum``.
        TypeError: If an entry is not an integer.
    """
    if not isinstance(value, (int, Sequence)):
        raise TypeError(f"`{name}` must be an integer or integers, got {value!r}.")
    sizes = (value,) * ndim if isinstance(value, int) else tuple(value)
    if len(sizes) == 1:
        sizes = sizes * ndim
    if any(isinstance(size, bool) or not isinstance(size, int) for size in sizes):
        raise TypeError(f"`{name}` must be an integer or integers, got {value!r}.")
    if len(sizes) != ndim:
        raise ValueError(f"`{name}` must have one entry per dimension ({ndim}), got {value!r}.")
    if any(size < minimum for size in sizes):
        raise ValueError(f"`{name}` must be at least {minimum}, got {value!r}.")
    return sizes


def same_padding(kernel_size: Sizes, dilation: Sizes, ndim: int) -> tuple[tuple[int, int], ...]:
    """Padding that keeps the size at stride one: ``D (K - 1)``, the smaller half on the left."""
    kernel = per_dimension(kernel_size, ndim, "kernel_size")
    steps = per_dimension(dilation, ndim, "dilation")
    totals = [d * (k - 1) for k, d in zip(kernel, steps)]
    return tuple((total // 2, total - total // 2) for total in totals)


def parse_padding(padding: Padding, ndim: int) -> tuple[tuple[int, int], ...]:
    """Spell numeric padding out as ``(left, right)`` per dimension."""
    if isinstance(padding, str):
        raise ValueError(f"`padding` must be 'same', 'valid' or numbers, got {padding!r}.")
    entries: tuple[Any, ...] = (padding,) if isinstance(padding, int) else tuple(padding)
    entries = entries * ndim if len(entries) == 1 else entries
    if len(entries) != ndim:
        raise ValueError(f"`padding` must have one entry per dimension ({ndim}), got {padding!r}.")
    pairs = (entry if isinstance(entry, (tuple, list)) else (entry, entry) for entry in entries)
    sides = [per_dimension(tuple(pair), 2, "padding", minimum=0) for pair in pairs]
    return tuple((left, right) for left, right in sides)


def conv_geometry(
    input_size: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Geometry:
    """Parse torch's spellings of a convolution into one value.

    Args:
        input_size: Input positions per dimension; its length is the number of dimensions.
        kernel_size: Kernel entries, one number or one per dimension.
        stride: Stride, one number or one per dimension.
        padding: A number, one number or ``(left, right)`` pair per dimension, ``"valid"``
            (none) or ``"same"`` (output as large as the input; an odd total puts the larger
            half on the right).
        dilation: Dilation, one number or one per dimension.
        groups: Number of channel groups.

    Raises:
        ValueError: If a number is out of range, there is not one per dimension, the kernel
            does not fit, or ``"same"`` meets a stride.
        TypeError: If a hyper-parameter is not an integer.

    >>> conv_geometry((32, 28), kernel_size=3, stride=(2, 1), padding=1).output_size
    (16, 28)
    """
    return _convolution(
        tuple(input_size), *map(hashable, (kernel_size, stride, padding, dilation)), groups
    )


def conv_transpose_geometry(
    input_size: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    output_padding: Sizes = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Geometry:
    """Return the convolution whose adjoint is the transposed convolution described.

    The transposed convolution maps that convolution's output (``input_size`` here) to its
    input, of size ``(O - 1) S - p_left - p_right + D (K - 1) + 1 + output_padding``.

    Raises:
        ValueError: As `conv_geometry`; also if ``output_padding`` reaches stride and dilation,
            or if no output would be left.

    >>> conv_transpose_geometry((7,), kernel_size=3, stride=2, output_padding=1).input_size
    (16,)
    """
    ndim = len(input_size)
    sizes = per_dimension(tuple(input_size), ndim, "input_size")
    kernel = per_dimension(kernel_size, ndim, "kernel_size")
    strides = per_dimension(stride, ndim, "stride")
    steps = per_dimension(dilation, ndim, "dilation")
    extra = per_dimension(output_padding, ndim, "output_padding", minimum=0)
    sides = ((0, 0),) * ndim if padding == "valid" else parse_padding(padding, ndim)
    for e, s, d in zip(extra, strides, steps):
        if e >= max(s, d):
            raise ValueError(
                f"`output_padding` must be smaller than stride or dilation, got {e} with "
                f"stride {s} and dilation {d}."
            )
    targets = tuple(
        (o - 1) * s - sum(p) + d * (k - 1) + 1 + e
        for o, s, p, d, k, e in zip(sizes, strides, sides, steps, kernel, extra)
    )
    if any(target < 1 for target in targets):
        raise ValueError(
            f"`padding` must leave at least one output position, got {padding!r} for an "
            f"output of {targets}."
        )
    # output padding beyond the stride would make room for further outputs of the convolution
    fixed = [(p[0], p[1] - max(0, e - s + 1)) for p, e, s in zip(sides, extra, strides)]
    return Geometry(tuple(Axis(*a) for a in zip(targets, kernel, strides, fixed, steps)), groups)


def output_padding_of(
    output_size: Sizes,
    input_size: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
) -> tuple[int, ...]:
    """Return the output padding with which a transposed convolution has an output size.

    Raises:
        ValueError: If none below stride or dilation does; as `conv_geometry`.

    >>> output_padding_of(16, (7,), kernel_size=3, stride=2)
    (1,)
    """
    ndim = len(input_size)
    sizes = per_dimension(output_size, ndim, "output_size")
    kernel = per_dimension(kernel_size, ndim, "kernel_size")
    strides = per_dimension(stride, ndim, "stride")
    steps = per_dimension(dilation, ndim, "dilation")
    sides = parse_padding(padding, ndim)
    least = tuple(
        (o - 1) * s - sum(p) + d * (k - 1) + 1
        for o, s, p, d, k in zip(input_size, strides, sides, steps, kernel)
    )
    largest = tuple(low + max(s, d) - 1 for low, s, d in zip(least, strides, steps))
    if not all(low <= size <= high for low, size, high in zip(least, sizes, largest)):
        raise ValueError(
            f"`output_size` must be between {least} and {largest}, got {output_size!r}."
        )
    return tuple(size - low for size, low in zip(sizes, least))


def hashable(value: Any) -> Any:
    """Turn lists into tuples, nested ones too."""
    if not isinstance(value, (list, tuple)):
        return value
    try:
        hash(value)
    except TypeError:
        return tuple(map(hashable, value))
    return value


def parse_convolution(
    input_size: Sequence[int],
    kernel_size: Sizes,
    stride: Sizes = 1,
    padding: Padding = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Geometry:
    """Parse torch's spellings without a cache; see `conv_geometry`."""
    ndim = len(input_size)
    sizes = per_dimension(tuple(input_size), ndim, "input_size")
    kernel = per_dimension(kernel_size, ndim, "kernel_size")
    strides = per_dimension(stride, ndim, "stride")
    steps = per_dimension(dilation, ndim, "dilation")
    if padding == "same":
        if any(s != 1 for s in strides):
            raise ValueError(f"`padding`='same' must come with stride 1, got stride {stride!r}.")
        sides = same_padding(kernel, steps, ndim)
    elif padding == "valid":
        sides = ((0, 0),) * ndim
    else:
        sides = parse_padding(padding, ndim)
    return Geometry(tuple(Axis(*a) for a in zip(sizes, kernel, strides, sides, steps)), groups)


_convolution = lru_cache(maxsize=4096)(parse_convolution)

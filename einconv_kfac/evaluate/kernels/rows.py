"""Rows: an input unfolded along all axes but the first, of which kernel entries meet slices.

Along the first axis, output ``o`` meets kernel entry ``k`` at padded position
``o S + k D``, that is at position ``o + k D // S`` of phase ``k D mod S``. Let ``p`` be the
positions of a phase times the remaining outputs. Then every kernel entry of the first axis
meets one contiguous slice of the rows ``u[phase, n, g, (ci k1 ..), p]``, and a convolution is
as many matrix products as the first axis has kernel entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels.chunks import batch_slices
from einconv_kfac.evaluate.kernels.windows import fold_axis
from einconv_kfac.geometry import Axis, Geometry
from einconv_kfac.padding import padded

ROWS_BYTES_PER_THREAD = 2**21
"""Size of the rows of a chunk of examples."""


class Slide(NamedTuple):
    """Sizes of one axis; other than in an `Axis`, the padding on the left may be negative."""

    input_size: int
    kernel_size: int
    stride: int
    left: int
    dilation: int
    output_size: int

    @property
    def length(self) -> int:
        """Number of padded positions up to the end of the last window."""
        return (self.output_size - 1) * self.stride + (self.kernel_size - 1) * self.dilation + 1

    @property
    def phase_size(self) -> int:
        """Number of padded positions per phase of the stride."""
        return self.output_size + (self.kernel_size - 1) * self.dilation // self.stride


@dataclass(frozen=True)
class Rows:
    """The layout of the rows of an input; see the module's description."""

    slides: tuple[Slide, ...]
    groups: int

    @cached_property
    def rest(self) -> int:
        """Number of outputs of all axes but the first."""
        return prod(slide.output_size for slide in self.slides[1:])

    @cached_property
    def entries(self) -> int:
        """Number of kernel entries of all axes but the first."""
        return prod(slide.kernel_size for slide in self.slides[1:])

    @cached_property
    def width(self) -> int:
        """Size of dimension ``p`` of the rows."""
        return self.slides[0].phase_size * self.rest

    @cached_property
    def outputs(self) -> int:
        """Number of output positions, and length of every slice."""
        return self.slides[0].output_size * self.rest

    @cached_property
    def slices(self) -> tuple[tuple[int, int], ...]:
        """Phase and start of the slice of every kernel entry of the first axis."""
        first = self.slides[0]
        offsets = (k * first.dilation for k in range(first.kernel_size))
        return tuple((o % first.stride, o // first.stride * self.rest) for o in offsets)

    @cached_property
    def phases(self) -> int:
        """Number of phases of the first axis that kernel entries meet."""
        return 1 + max(phase for phase, _ in self.slices)

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Padding with which inputs end with the last window; may be negative."""
        first = self.slides[0]
        ends = (
            (first.phase_size - 1) * first.stride + self.phases,
            *(s.length for s in self.slides[1:]),
        )
        return tuple((s.left, end - s.left - s.input_size) for s, end in zip(self.slides, ends))

    def of(self, x: Tensor) -> Tensor:
        """Return the rows ``[phase, n, g, (ci k1 ..), p]`` of inputs ``[n, (g ci), *i]``."""
        n, channels = x.shape[:2]
        x = x.reshape(n, channels, *(slide.input_size for slide in self.slides))
        x = padded(x, self.sides)
        more = len(self.slides) - 1
        for axis in range(more, 0, -1):  # x: [n, c, k(axis+1) .., i0 .., o(axis+1) ..]
            slide, dim = self.slides[axis], 2 + more
            span = (slide.kernel_size - 1) * slide.dilation + 1
            windows = x.unfold(dim, span, slide.stride)[..., :: slide.dilation]
            x = windows.movedim(-1, 2)
            if axis > 1:  # the last and largest copy then moves long contiguous runs
                x = x.contiguous()
        inner = channels // self.groups * self.entries
        phases = x.unfold(2 + more, self.phases, self.slides[0].stride).movedim(-1, 0)
        return phases.reshape(self.phases, n, self.groups, inner, self.width)

    def fold(self, rows: Tensor, channels: int) -> Tensor:
        """Return the adjoint of `of`: ``[n, (g ci), *i]``, with overlaps summed."""
        first, more = self.slides[0], len(self.slides) - 1
        n = rows.shape[1]
        kernel = [slide.kernel_size for slide in self.slides[1:]]
        output = [slide.output_size for slide in self.slides[1:]]
        rows = rows.reshape(self.phases, n, channels, *kernel, first.phase_size, *output)
        for axis in range(more, 0, -1):  # rows: [phase, n, c, k1 .., position, o1 ..]
            slide = self.slides[axis]
            rows = fold_axis(rows, 2 + axis, 3 + 2 * axis, slide.dilation, slide.stride)
        image = fold_axis(rows, 0, 3, 1, first.stride)  # [n, c, i0, ..]
        return padded(image, tuple((-left, -right) for left, right in self.sides))

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Split the batch into chunks whose rows fit into the processor's cache."""
        example_bytes = x.shape[1] * self.entries * self.width * self.phases * x.itemsize
        return batch_slices(x, example_bytes, ROWS_BYTES_PER_THREAD * torch.get_num_threads())


@lru_cache(maxsize=1024)
def rows_of(geometry: Geometry, unfold_all: bool = False) -> Rows:
    """Return the layout for the input of a convolution.

    With ``unfold_all`` the kernel entries of all axes are in the rows (im2col), and one matrix
    product sums over them.
    """
    return _rows(tuple(map(_slide, geometry.axes)), geometry.groups, unfold_all)


@lru_cache(maxsize=1024)
def adjoint_rows_of(geometry: Geometry, unfold_all: bool = False) -> Rows:
    """Return the layout for the output of a convolution of stride one.

    At stride one the input VJP is a convolution of the output with the kernel reversed.
    """
    slides = tuple(
        Slide(
            axis.output_size,
            axis.kernel_size,
            1,
            axis.span - 1 - axis.padding[0],
            axis.dilation,
            axis.input_size,
        )
        for axis in geometry.axes
    )
    return _rows(slides, geometry.groups, unfold_all)


def _rows(slides: tuple[Slide, ...], groups: int, unfold_all: bool) -> Rows:
    """Return the layout, with a first axis of size one if all given axes are unfolded."""
    if unfold_all or len(slides) == 1:
        slides = (Slide(1, 1, 1, 0, 1, 1), *slides)
    return Rows(slides, groups)


def _slide(axis: Axis) -> Slide:
    """Return the sizes of an axis."""
    sizes = axis.input_size, axis.kernel_size, axis.stride
    return Slide(*sizes, axis.padding[0], axis.dilation, axis.output_size)

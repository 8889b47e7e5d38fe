"""Convolutions with one channel per group: every kernel entry scales a slice of a grid.

The grid has one phase per residue of the stride, and all dimensions of a phase flattened into
one. Each kernel entry then meets one contiguous slice of the grid, so that the convolution is a
sum over kernel entries of scaled slices. Grid positions between the rows of the output are
computed and dropped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels.chunks import batch_slices
from einconv_kfac.evaluate.kernels.windows import fold_axis
from einconv_kfac.geometry import Axis, Geometry
from einconv_kfac.padding import padded

GRID_BYTES_PER_THREAD = 2**20
"""Size of the grid of a chunk of examples."""


@dataclass(frozen=True)
class Grid:
    """The layout of an input, by phases of the stride; see the module's description."""

    axes: tuple[Axis, ...]

    @cached_property
    def phases(self) -> tuple[int, ...]:
        """Number of phases that kernel entries meet, per axis."""
        return tuple(
            1 + max(k * axis.dilation % axis.stride for k in range(axis.kernel_size))
            for axis in self.axes
        )

    @cached_property
    def phase_sizes(self) -> tuple[int, ...]:
        """Number of positions of a phase, per axis."""
        return tuple(
            axis.output_size + (axis.kernel_size - 1) * axis.dilation // axis.stride
            for axis in self.axes
        )

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Distance in the flattened grid of adjacent positions of a phase, per axis."""
        return tuple(prod(self.phase_sizes[dim + 1 :]) for dim in range(len(self.axes)))

    @cached_property
    def length(self) -> int:
        """Number of positions of the flattened grid from the first to the last output."""
        return 1 + sum((a.output_size - 1) * step for a, step in zip(self.axes, self.steps))

    @cached_property
    def output(self) -> tuple[int, ...]:
        """Size of the grid of outputs; as wide as the input's in all dimensions but the first."""
        return (self.axes[0].output_size, *self.phase_sizes[1:])

    @cached_property
    def slices(self) -> tuple[tuple[tuple[int, ...], slice], ...]:
        """Phase of every kernel entry, and the slice that it meets."""
        slices = []
        for entry in product(*(range(axis.kernel_size) for axis in self.axes)):
            offsets = [k * axis.dilation for k, axis in zip(entry, self.axes)]
            phase = tuple(o % axis.stride for o, axis in zip(offsets, self.axes))
            start = sum(
                o // axis.stride * step for o, axis, step in zip(offsets, self.axes, self.steps)
            )
            slices.append((phase, slice(start, start + self.length)))
        return tuple(slices)

    @cached_property
    def sides(self) -> tuple[tuple[int, int], ...]:
        """Padding that fills every phase; may be negative."""
        lengths = (
            (size - 1) * axis.stride + phases
            for axis, size, phases in zip(self.axes, self.phase_sizes, self.phases)
        )
        return tuple(
            (axis.padding[0], length - axis.input_size - axis.padding[0])
            for axis, length in zip(self.axes, lengths)
        )

    def of(self, x: Tensor) -> Tensor:
        """Return the grid ``[*phases, n, g, p]`` of inputs ``[n, g, *i]``."""
        x = padded(x, self.sides)
        for dim, (axis, phases) in enumerate(zip(self.axes, self.phases), start=2):
            x = x.unfold(dim, phases, axis.stride)
        ndim = len(self.axes)  # x: [n, g, *phase_sizes, *phases]
        return x.permute(*range(2 + ndim, 2 + 2 * ndim), *range(2 + ndim)).flatten(2 + ndim)

    def fold(self, grid: Tensor) -> Tensor:
        """Return the adjoint of `of`, ``[n, g, *i]``."""
        ndim = len(self.axes)
        grid = grid.unflatten(-1, self.phase_sizes)  # type: ignore[no-untyped-call]
        for remaining, axis in zip(range(ndim, 0, -1), self.axes):
            grid = fold_axis(grid, 0, 2 + remaining, 1, axis.stride)  # [phases1 .., n, g, i0, ..]
            grid = grid.movedim(1 + remaining, -1)
        return padded(grid, tuple((-left, -right) for left, right in self.sides))

    def chunks(self, x: Tensor) -> Iterator[slice]:
        """Split the batch into chunks whose grid fits into the processor's cache."""
        example_bytes = x.shape[1] * prod(self.phases) * prod(self.phase_sizes) * x.itemsize
        return batch_slices(x, example_bytes, GRID_BYTES_PER_THREAD * torch.get_num_threads())


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, (g co), *o]`` for one input channel per group."""
    grid, groups = grid_of(geometry), geometry.groups
    kernel = weight.reshape(groups, -1, len(grid.slices), 1)  # [g, co, k, 1]
    output = x.new_empty(len(x), groups, kernel.shape[1], *geometry.output_size)
    for part in grid.chunks(x):
        inputs = grid.of(x[part])
        sums = inputs.new_empty(inputs.shape[-3], groups, kernel.shape[1], prod(grid.output))
        target = sums[..., : grid.length]
        for entry, (phase, window) in enumerate(grid.slices):
            shifted = inputs[phase][..., None, window]  # [n, g, 1, p]
            if entry == 0:
                torch.mul(shifted, kernel[:, :, entry], out=target)
            else:
                target.addcmul_(shifted, kernel[:, :, entry])
        output[part] = _cropped(sums.unflatten(-1, grid.output), geometry)  # type: ignore[no-untyped-call]
    return output.flatten(1, 2)


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, g, *i]`` for one channel per group."""
    grid, groups = grid_of(geometry), geometry.groups
    kernel = weight.reshape(groups, len(grid.slices), 1)  # [g, k, 1]
    result = v.new_empty(len(v), groups, *geometry.input_size)
    gaps = tuple((0, wide - size) for wide, size in zip(grid.output, geometry.output_size))
    for part in grid.chunks(v):
        outputs = padded(v[part], gaps).flatten(2)[..., : grid.length]
        sums = outputs.new_zeros(*grid.phases, *outputs.shape[:2], prod(grid.phase_sizes))
        for entry, (phase, window) in enumerate(grid.slices):
            sums[phase][..., window].addcmul_(outputs, kernel[:, entry])
        result[part] = grid.fold(sums)
    return result


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [g, 1, *k]`` for one channel per group."""
    grid, groups = grid_of(geometry), geometry.groups
    total = x.new_zeros(len(grid.slices), groups)
    gaps = tuple((0, wide - size) for wide, size in zip(grid.output, geometry.output_size))
    for part in grid.chunks(x):
        inputs = grid.of(x[part])
        outputs = padded(v[part], gaps).flatten(2)[..., : grid.length]
        products = torch.empty_like(outputs)
        for entry, (phase, window) in enumerate(grid.slices):
            torch.mul(inputs[phase][..., window], outputs, out=products)
            total[entry] += products.sum((0, 2))
    return total.t().reshape(groups, 1, *geometry.kernel_size)


@lru_cache(maxsize=1024)
def grid_of(geometry: Geometry) -> Grid:
    """Return the layout for the input of a convolution."""
    return Grid(geometry.axes)


def _cropped(grid: Tensor, geometry: Geometry) -> Tensor:
    """Drop the positions between the rows of the output."""
    for dim, size in enumerate(geometry.output_size, start=grid.ndim - geometry.ndim):
        grid = grid.narrow(dim, 0, size)
    return grid

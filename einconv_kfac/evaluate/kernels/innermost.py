"""Convolutions with one channel per group on small images, channels innermost.

With positions first, ``[*i, n, g]``, every kernel entry scales the inputs that it meets, channel
by channel. Padding, which small images have much of, is neither stored nor multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod

from torch import Tensor

from einconv_kfac.evaluate.kernels.chunks import batch_slices
from einconv_kfac.geometry import Axis, Geometry

INNERMOST_CHUNK_BYTES = 2**20
"""Size of the inputs and outputs of a chunk of examples."""

INNERMOST_MAX_OUTPUTS = 1024
"""Number of outputs up to which the layout is faster; three times as many with strides."""

Slices = tuple[slice, ...]
Meeting = tuple[int, Slices, Slices]
"""The number of a kernel entry, and the slices of two tensors that it connects."""


def pays(geometry: Geometry) -> bool:
    """Return whether images are small enough that moving their channels is faster."""
    return geometry.positions <= (
        INNERMOST_MAX_OUTPUTS if max(geometry.stride) == 1 else 3 * INNERMOST_MAX_OUTPUTS
    )


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, g, *o]`` for one input and one output channel per group."""
    return _scaled(geometry, x, weight, geometry.output_size, meetings(geometry))


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, g, *i]`` for one channel per group."""
    return _scaled(geometry, v, weight, geometry.input_size, adjoint_meetings(geometry))


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [g, 1, *k]`` for one channel per group."""
    total = x.new_zeros(prod(geometry.kernel_size), x.shape[1])
    rest = tuple(range(geometry.ndim + 1))
    for part in _chunks(geometry, x):
        inputs, vectors = _moved(x[part]), _moved(v[part])
        for entry, source, target in meetings(geometry):
            total[entry] += (inputs[source] * vectors[target]).sum(rest)
    return total.t().reshape(-1, 1, *geometry.kernel_size)


@lru_cache(maxsize=1024)
def meetings(geometry: Geometry) -> tuple[Meeting, ...]:
    """Return the kernel entries that meet an input, with those inputs and the outputs."""
    met = []
    entries = product(*(range(size) for size in geometry.kernel_size))
    for number, entry in enumerate(entries):
        outputs = [axis.outputs(k) for axis, k in zip(geometry.axes, entry)]
        if all(outputs):
            inputs = (_inputs(*pair) for pair in zip(geometry.axes, entry, outputs))
            met.append((number, tuple(inputs), tuple(slice(o.start, o.stop) for o in outputs)))
    return tuple(met)


@lru_cache(maxsize=1024)
def adjoint_meetings(geometry: Geometry) -> tuple[Meeting, ...]:
    """Return the meetings with the outputs before the inputs."""
    return tuple((entry, outputs, inputs) for entry, inputs, outputs in meetings(geometry))


def _scaled(
    geometry: Geometry, x: Tensor, weight: Tensor, size: tuple[int, ...], met: Sequence[Meeting]
) -> Tensor:
    """Sum, into results ``[n, g, *size]``, the slices of ``x`` scaled by their kernel entries."""
    result = x.new_empty(*x.shape[:2], *size)
    kernel = weight.flatten(1).t().contiguous()  # [k, g]
    for part in _chunks(geometry, x):
        moved = _moved(x[part])
        sums = x.new_zeros(*size, *moved.shape[-2:])
        for entry, source, target in met:
            sums[target].addcmul_(moved[source], kernel[entry])
        result[part] = _moved_back(sums)
    return result


def _inputs(axis: Axis, entry: int, outputs: range) -> slice:
    """Return the inputs that a kernel entry meets for some outputs."""
    first, last = (axis.input_position(entry, output) for output in (outputs[0], outputs[-1]))
    return slice(first, last + 1, axis.stride)


def _chunks(geometry: Geometry, like: Tensor) -> Iterator[slice]:
    """Split the batch into chunks that fit into the processor's cache."""
    positions = geometry.positions + prod(geometry.input_size)
    return batch_slices(like, like.shape[1] * positions * like.itemsize, INNERMOST_CHUNK_BYTES)


def _moved(x: Tensor) -> Tensor:
    """Move batch and channels behind the positions: ``[n, g, *i] -> [*i, n, g]``."""
    return x.movedim((0, 1), (-2, -1)).contiguous()


def _moved_back(x: Tensor) -> Tensor:
    """Move batch and channels in front of the positions: ``[*i, n, g] -> [n, g, *i]``."""
    return x.movedim((-2, -1), (0, 1))

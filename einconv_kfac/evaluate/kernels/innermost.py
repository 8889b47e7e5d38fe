"""Convolutions with one channel per group on small images, channels innermost.

With positions in front, ``[*i, n, g]``, every kernel entry scales the inputs that it meets,
channel by channel. Padding, of which small images have much, is neither stored nor multiplied.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from math import prod

from torch import Tensor

from einconv_kfac.geometry import Axis, Geometry

CHUNK_BYTES = 2**20
"""Positions of inputs and outputs that are worked on at a time."""

MOST = 1024
"""Outputs up to which the layout pays for its copies; with strides, three times as many."""

Slices = tuple[slice, ...]


def pays(geometry: Geometry) -> bool:
    """Whether images are small enough to move their channels."""
    return geometry.positions <= (MOST if max(geometry.stride) == 1 else 3 * MOST)


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, g, *o]`` for one input and one output channel per group."""
    output = x.new_empty(*x.shape[:2], *geometry.output_size)
    kernel = weight.flatten(1).t().contiguous()  # [k, g]
    for part in _chunks(geometry, x):
        inputs = _moved(x[part])
        sums = x.new_zeros(*geometry.output_size, *inputs.shape[-2:])
        for entry, source, target in meetings(geometry):
            sums[target].addcmul_(inputs[source], kernel[entry])
        output[part] = _moved_back(sums)
    return output


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, g, *i]`` for one channel per group."""
    result = v.new_empty(*v.shape[:2], *geometry.input_size)
    kernel = weight.flatten(1).t().contiguous()  # [k, g]
    for part in _chunks(geometry, v):
        vectors = _moved(v[part])
        sums = v.new_zeros(*geometry.input_size, *vectors.shape[-2:])
        for entry, source, target in meetings(geometry):
            sums[source].addcmul_(vectors[target], kernel[entry])
        result[part] = _moved_back(sums)
    return result


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
def meetings(geometry: Geometry) -> tuple[tuple[int, Slices, Slices], ...]:
    """Return every kernel entry that meets an input, with the inputs and the outputs it meets."""
    met = []
    entries = product(*(range(size) for size in geometry.kernel_size))
    for number, entry in enumerate(entries):
        outputs = [axis.outputs(k) for axis, k in zip(geometry.axes, entry)]
        if all(outputs):
            inputs = (_inputs(*pair) for pair in zip(geometry.axes, entry, outputs))
            met.append((number, tuple(inputs), tuple(slice(o.start, o.stop) for o in outputs)))
    return tuple(met)


def _inputs(axis: Axis, entry: int, outputs: range) -> slice:
    """Return the inputs that a kernel entry meets for some outputs."""
    first, last = (axis.input_position(entry, output) for output in (outputs[0], outputs[-1]))
    return slice(first, last + 1, axis.stride)


def _chunks(geometry: Geometry, like: Tensor) -> Iterator[slice]:
    """Split the batch so that inputs and outputs of a chunk stay in the processor's cache."""
    n = size = len(like)
    if like.device.type == "cpu":
        positions = geometry.positions + prod(geometry.input_size)
        size = CHUNK_BYTES // (like.shape[1] * positions * like.itemsize)
    return (slice(start, start + max(size, 1)) for start in range(0, n, max(size, 1)))


def _moved(x: Tensor) -> Tensor:
    """Move batch and channels behind the positions: ``[n, g, *i] -> [*i, n, g]``."""
    return x.movedim((0, 1), (-2, -1)).contiguous()


def _moved_back(x: Tensor) -> Tensor:
    """Move batch and channels in front of the positions."""
    return x.movedim((-2, -1), (0, 1))

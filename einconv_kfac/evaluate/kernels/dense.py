"""A convolution's three contractions as matrix products of `Rows`."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels import columns
from einconv_kfac.evaluate.kernels.rows import Rows, adjoint_rows_of, rows_of
from einconv_kfac.geometry import Geometry

LOW_PRECISION = (torch.bfloat16, torch.float16)

MIN_SUMMANDS = 32
"""Summands per product below which all kernel entries are unfolded, for one longer product."""

MIN_POSITIONS_PER_EXAMPLE = 64
"""Number of positions from which on a product per example is faster in a pointwise VJP."""

TRANSPOSED_MIN_POSITIONS = 512
"""Number of positions from which on the transposed product and a copy are faster."""

MIN_OUTPUTS_PER_EXAMPLE = 128
"""Number of outputs from which on a product per example is faster."""


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, (g co), *o]``."""
    if _pointwise(geometry):
        matrices = weight.view(geometry.groups, -1, weight.shape[1])
        return _mixed(matrices, x[_positions(geometry)], geometry.output_size)
    rows = rows_of(geometry, unfold_all=_unfolds_all(geometry, weight))
    output = _convolved(rows, x, _entries(weight, rows))
    return output.view(x.shape[0], weight.shape[0], *geometry.output_size)


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, (g ci), *i]``."""
    if _pointwise(geometry) and geometry.input_size == geometry.output_size:
        matrices = weight.view(geometry.groups, -1, weight.shape[1]).mT
        return _mixed(matrices, v, geometry.input_size)
    low = v.dtype in LOW_PRECISION
    channels = geometry.groups * weight.shape[1]
    if all(axis.stride == 1 for axis in geometry.axes):
        rows = adjoint_rows_of(geometry, low)
        spatial = tuple(range(2, weight.ndim))
        turned = torch.unflatten(weight.flip(spatial), 0, (geometry.groups, -1)).transpose(1, 2)
        output = _convolved(rows, v, _entries(turned.flatten(0, 1), rows))
        return output.view(v.shape[0], channels, *geometry.input_size)
    rows = rows_of(geometry, low)
    entries = _entries(weight, rows).transpose(2, 3)  # [k0, g, (ci k1 ..), co]
    result = v.new_empty(v.shape[0], channels, *geometry.input_size)
    v = v.reshape(v.shape[0], geometry.groups, -1, rows.outputs)
    for part in rows.chunks(result):
        folded = rows.fold(_scattered(rows, v[part], entries), channels)
        result[part] = folded.view(-1, *result.shape[1:])
    return result


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [(g co), ci, *k]``."""
    groups, channels = geometry.groups, x.shape[1] // geometry.groups
    if _pointwise(geometry) and x.dtype not in LOW_PRECISION:
        matrices = _mixing(groups, x[_positions(geometry)], v)
        return matrices.view(v.shape[1], channels, *geometry.kernel_size)
    if columns.pays(geometry, x):
        return columns.weight_vjp(geometry, x, v)
    rows = rows_of(geometry, unfold_all=channels * geometry.kernel_size[-1] < MIN_SUMMANDS)
    v = v.reshape(v.shape[0], groups, -1, rows.outputs)
    shape = (len(rows.slices), groups, v.shape[2], channels * rows.entries)
    total = x.new_zeros(shape, dtype=_accumulator(x.dtype))
    add_ = _correlate_each_ if rows.outputs >= MIN_OUTPUTS_PER_EXAMPLE else _correlate_
    for part in rows.chunks(x):
        add_(total, rows, rows.of(x[part]), v[part])
    kernel = [slide.kernel_size for slide in rows.slides]
    total = total.to(x.dtype).reshape(kernel[0], groups * v.shape[2], channels, *kernel[1:])
    return total.movedim(0, 2).reshape(-1, channels, *geometry.kernel_size)


def _pointwise(geometry: Geometry) -> bool:
    """Return whether the kernel has one entry and the input no padding."""
    return all(axis.kernel_size == 1 and axis.padding == (0, 0) for axis in geometry.axes)


def _positions(geometry: Geometry) -> tuple[slice, ...]:
    """Return the index of the inputs that a pointwise convolution meets."""
    return (slice(None), slice(None), *(slice(None, None, axis.stride) for axis in geometry.axes))


def _mixed(matrices: Tensor, x: Tensor, sizes: tuple[int, ...]) -> Tensor:
    """Multiply the channels of each group, at every position, by a matrix ``[g, co, ci]``."""
    n, groups = x.shape[0], len(matrices)
    channels = x.reshape(n * groups, matrices.shape[2], -1)
    if channels.shape[2] < MIN_OUTPUTS_PER_EXAMPLE and groups == 1:
        return _side_by_side(matrices[0], channels).contiguous().view(n, -1, *sizes)
    return torch.bmm(_repeated(matrices, len(channels)), channels).view(n, -1, *sizes)


def _mixing(groups: int, x: Tensor, v: Tensor) -> Tensor:
    """Return the matrices ``[g, co, ci]`` that are the weight VJP of `_mixed`."""
    if groups > 1 or x[0, 0].numel() < MIN_POSITIONS_PER_EXAMPLE:
        x, v = (torch.unflatten(t, 1, (groups, -1)).flatten(3) for t in (x, v))
        x, v = (t.permute(1, 2, 0, 3).flatten(2) for t in (x, v))  # [g, c, (n o)]
        return torch.bmm(v, x.mT)
    x, v = x.flatten(2), v.flatten(2)  # [n, c, o]
    turned = (
        x.shape[2] >= TRANSPOSED_MIN_POSITIONS and 2 * v.shape[1] <= x.shape[1]
    )  # a short product on the right
    left, right = (x, v) if turned else (v, x)
    (a, b), *more = zip(left.unbind(), right.mT.unbind())
    total = torch.mm(a, b)
    for a, b in more:
        total.addmm_(a, b)
    return (total.t().contiguous() if turned else total)[None]


def _side_by_side(matrix: Tensor, columns: Tensor) -> Tensor:
    """Multiply columns ``[n, c, o]`` by a matrix, all examples in one product."""
    product = matrix @ columns.movedim(1, 0).flatten(1)  # [co, (n o)]
    return product.view(len(matrix), len(columns), -1).movedim(0, 1)


def _unfolds_all(geometry: Geometry, weight: Tensor) -> bool:
    """Return whether one matrix product over all kernel entries is faster."""
    if geometry.positions < MIN_OUTPUTS_PER_EXAMPLE and geometry.groups == 1:
        return True
    narrow = weight.shape[1] * geometry.kernel_size[-1] < MIN_SUMMANDS
    return narrow or weight.dtype in LOW_PRECISION


def _convolved(rows: Rows, x: Tensor, entries: Tensor) -> Tensor:
    """Return ``[n, g, co, o]`` for kernel entries ``[k0, g, co, (ci k1 ..)]``."""
    n = x.shape[0]
    output = x.new_empty(n, rows.groups, entries.shape[2], rows.outputs)
    if rows.outputs < MIN_OUTPUTS_PER_EXAMPLE and rows.groups == len(entries) == 1:
        for part in rows.chunks(x):
            unfolded = rows.of(x[part])[0, :, 0]
            output[part, 0] = _side_by_side(entries[0, 0], unfolded)
        return output
    for part in rows.chunks(x):
        unfolded = rows.of(x[part]).flatten(1, 2)  # [phase, (n g), (ci k1 ..), p]
        target = output[part].view(-1, *output.shape[2:])
        for entry, (phase, start) in enumerate(rows.slices):
            window = unfolded[phase, :, :, start : start + rows.outputs]
            kernel = _repeated(entries[entry], len(window))
            if entry == 0:
                torch.bmm(kernel, window, out=target)
            else:
                target.baddbmm_(kernel, window)
    return output


def _scattered(rows: Rows, v: Tensor, entries: Tensor) -> Tensor:
    """Return the input VJP in the layout of rows, ``[phase, n, g, (ci k1 ..), p]``."""
    v = v.flatten(0, 1)  # [(n g), co, o]
    scattered = v.new_zeros(rows.phases, len(v), entries.shape[2], rows.width)
    for entry, (phase, start) in enumerate(rows.slices):
        window = scattered[phase, :, :, start : start + rows.outputs]
        window.baddbmm_(_repeated(entries[entry], len(v)), v)
    return torch.unflatten(scattered, 1, (-1, rows.groups))


def _correlate_each_(total: Tensor, rows: Rows, unfolded: Tensor, v: Tensor) -> None:
    """Add one product per example to ``[k0, g, co, (ci k1 ..)]``."""
    for example, vector in enumerate(v):  # vector: [g, co, o]
        for entry, (phase, start) in enumerate(rows.slices):
            window = unfolded[phase, example, :, :, start : start + rows.outputs]
            _add_product_(total[entry], vector, window.transpose(1, 2))


def _correlate_(total: Tensor, rows: Rows, unfolded: Tensor, v: Tensor) -> None:
    """Add one product for all examples to ``[k0, g, co, (ci k1 ..)]``.

    Examples are concatenated in one dimension; outputs are padded with zeros to the width of the
    rows, so that slices may reach from one example into the next.
    """
    unfolded = unfolded.movedim(1, 3).flatten(3)  # [phase, g, (ci k1 ..), (n p)]
    gap = rows.width - rows.outputs
    v = torch.nn.functional.pad(v, (0, gap)) if gap and len(v) > 1 else v
    v = v.movedim(0, 2).flatten(2)  # [g, co, (n p)]
    length = v.shape[2]
    for entry, (phase, start) in enumerate(rows.slices):
        end = min(start + length, unfolded.shape[3])
        window = unfolded[phase, :, :, start:end].transpose(1, 2)
        _add_product_(total[entry], v[:, :, : end - start], window)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a batched matrix product, in the precision of ``total``."""
    if total.dtype != left.dtype:
        total += torch.bmm(left, right)
    elif len(total) == 1:
        total[0].addmm_(left[0], right[0])
    else:
        total.baddbmm_(left, right)


def _entries(weight: Tensor, rows: Rows) -> Tensor:
    """Return kernel entries of the first axis, ``[k0, g, co, (ci k1 ..)]``."""
    weight = weight.reshape(*weight.shape[:2], rows.slides[0].kernel_size, -1)
    entries = weight.movedim(2, 0).flatten(2)
    return torch.unflatten(entries, 1, (rows.groups, -1))


def _repeated(matrices: Tensor, count: int) -> Tensor:
    """Repeat one matrix per group, ``[g, ..]``, over a batch ``[(n g), ..]``."""
    groups = len(matrices)
    if groups == 1:
        return matrices.expand(count, -1, -1)
    return matrices.expand(count // groups, *matrices.shape).reshape(count, *matrices.shape[1:])


def _accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the type of sums over chunks."""
    return torch.float32 if dtype in LOW_PRECISION else dtype

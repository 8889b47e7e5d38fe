"""Convolutions in four dimensions and more, as one three-dimensional convolution.

Outputs of the leading axes are merged into the batch, and their kernel entries into the channels.
The rest is one convolution along the last three axes, by torch's own kernel.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional, grad

from einconv_kfac.evaluate.kernels.windows import fold, windows_of
from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import padded

TORCH_AXES = 3
"""Number of axes of torch's largest convolution."""

conv3d: Any = functional.conv3d
conv3d_input: Any = grad.conv3d_input
conv3d_weight: Any = grad.conv3d_weight


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, (g co), *o]``."""
    lead, last = _parts(geometry)
    stacked: Tensor = conv3d(_stacked(geometry, x), _flat(geometry, weight), **_options(last))
    output = stacked.reshape(x.shape[0], lead.positions, -1, *last.output_size).movedim(1, 2)
    return output.reshape(x.shape[0], weight.shape[0], *geometry.output_size)


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, (g ci), *i]``."""
    lead, last = _parts(geometry)
    n, channels = v.shape[0], geometry.groups * weight.shape[1]
    entries = prod(lead.kernel_size)
    sizes = [size + sum(sides) for size, sides in zip(last.input_size, last.exact_padding)]
    shape = (n * lead.positions, channels * entries, *sizes)
    stacked: Tensor = conv3d_input(
        shape, _flat(geometry, weight), _batched(geometry, v), **_options(last)
    )
    stacked = padded(stacked, [(-left, -right) for left, right in last.exact_padding])
    columns = stacked.reshape(n, lead.positions, channels * entries, -1).permute(0, 3, 2, 1)
    image = fold(lead, columns.flatten(0, 1))  # [(n, *last), (g ci), *lead]
    image = torch.unflatten(image, 0, (n, -1)).movedim(1, -1)
    return image.reshape(n, channels, *geometry.input_size)


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [(g co), ci, *k]``."""
    lead, last = _parts(geometry)
    channels = x.shape[1] // geometry.groups
    shape = (v.shape[1], channels * prod(lead.kernel_size), *last.kernel_size)
    stacked = _stacked(geometry, x)
    flat: Tensor = conv3d_weight(stacked, shape, _batched(geometry, v), **_options(last))
    return flat.reshape(v.shape[1], channels, *geometry.kernel_size)


def _parts(geometry: Geometry) -> tuple[Geometry, Geometry]:
    """Return the leading axes, and the last three axes with the groups."""
    return Geometry(geometry.axes[:-TORCH_AXES]), Geometry(
        geometry.axes[-TORCH_AXES:], geometry.groups
    )


def _stacked(geometry: Geometry, x: Tensor) -> Tensor:
    """Return ``[(n o_lead), (g ci k_lead), *i_last]``, padded."""
    lead, last = _parts(geometry)
    rows = x.flatten(2 + lead.ndim).movedim(-1, 1).flatten(0, 1)  # [(n i_last), (g ci), *i_lead]
    columns = windows_of(lead, rows).reshape(x.shape[0], prod(last.input_size), -1, lead.positions)
    stacked = columns.permute(0, 3, 2, 1).reshape(-1, columns.shape[2], *last.input_size)
    return padded(stacked, last.exact_padding)


def _batched(geometry: Geometry, v: Tensor) -> Tensor:
    """Return ``[(n o_lead), (g co), *o_last]``."""
    lead, last = _parts(geometry)
    split = v.reshape(*v.shape[:2], lead.positions, *last.output_size)
    return split.movedim(2, 1).flatten(0, 1)


def _flat(geometry: Geometry, weight: Tensor) -> Tensor:
    """Return the kernel ``[(g co), (ci k_lead), *k_last]``."""
    return weight.reshape(weight.shape[0], -1, *geometry.kernel_size[-TORCH_AXES:])


def _options(last: Geometry) -> dict[str, Any]:
    """Return the options of torch's convolution for a padded input."""
    return {"stride": last.stride, "dilation": last.dilation, "groups": last.groups}

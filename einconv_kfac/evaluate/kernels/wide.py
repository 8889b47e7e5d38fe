"""Convolutions with a padding, stride or dilation far beyond any image: by their windows alone."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels import windows
from einconv_kfac.geometry import Geometry


def forward(geometry: Geometry, x: Tensor, weight: Tensor) -> Tensor:
    """Return ``x P W -> [n, (g co), *o]``."""
    output = _matrices(geometry, weight) @ _columns(geometry, x)  # [n, g, co, o]
    return output.view(x.shape[0], weight.shape[0], *geometry.output_size)


def input_vjp(geometry: Geometry, weight: Tensor, v: Tensor) -> Tensor:
    """Return ``W P v -> [n, (g ci), *i]``."""
    columns = _matrices(geometry, weight).mT @ _vectors(geometry, v)  # [n, g, (ci k), o]
    return windows.fold(geometry, columns.flatten(1, 2))


def weight_vjp(geometry: Geometry, x: Tensor, v: Tensor) -> Tensor:
    """Return ``x P v -> [(g co), ci, *k]``."""
    total = (_vectors(geometry, v) @ _columns(geometry, x).mT).sum(0)  # [g, co, (ci k)]
    return total.view(v.shape[1], -1, *geometry.kernel_size)


def _matrices(geometry: Geometry, weight: Tensor) -> Tensor:
    """Return a kernel as ``[g, co, (ci k)]``."""
    return torch.unflatten(weight.flatten(1), 0, (geometry.groups, -1))


def _columns(geometry: Geometry, x: Tensor) -> Tensor:
    """Return the windows of an input, ``[n, g, (ci k), o]``."""
    return torch.unflatten(windows.unfold(geometry, x), 1, (geometry.groups, -1))


def _vectors(geometry: Geometry, v: Tensor) -> Tensor:
    """Return vectors like the output as ``[n, g, co, o]``."""
    return torch.unflatten(v.flatten(2), 1, (geometry.groups, -1))

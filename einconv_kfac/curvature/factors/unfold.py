"""Windows of an input, as views of the zero-padded input; only the padding copies."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from einconv_kfac.curvature.devices.threads import run_tasks
from einconv_kfac.geometry import Geometry
from einconv_kfac.padding import pad_input


def windows(x: Tensor, geometry: Geometry) -> Tensor:
    """View ``x`` of shape ``[..., *i]`` as its windows ``[..., *o, *k]``."""
    first = x.ndim - geometry.ndim
    x = pad_input(x, geometry.padding)
    for dim, axis in enumerate(geometry.axes, start=first):
        x = x.unfold(dim, axis.span, axis.stride)
    for dim, axis in enumerate(geometry.axes, start=first + geometry.ndim):
        x = x[(slice(None),) * dim + (slice(None, None, axis.dilation),)]
    return x


def unfolded(x: Tensor, geometry: Geometry, threads: int = 1) -> Tensor:
    """Return im2col per group, ``[g, (ci k), (n o)]``, from ``x`` of shape ``[n, c, *i]``.

    Args:
        x: The input.
        geometry: The convolution.
        threads: Number of threads that unfold some of the examples each.
    """
    groups, n = geometry.groups, x.shape[0]
    shape = (groups, -1, n * geometry.positions)
    if threads == 1:
        return _columns(x, geometry).reshape(shape)
    sizes = (groups, x.shape[1] // groups, *geometry.kernel_size, n, *geometry.output_size)
    columns = x.new_empty(sizes)
    targets = columns.tensor_split(threads, 2 + geometry.ndim)
    parts = zip(targets, x.tensor_split(threads))
    run_tasks([partial(_copy_columns_, *part, geometry) for part in parts if len(part[1])], threads)
    return columns.view(shape)


def _columns(x: Tensor, geometry: Geometry) -> Tensor:
    """View the windows as columns of each group, ``[g, ci, *k, n, *o]``; only padding copies."""
    n, groups, d = x.shape[0], geometry.groups, geometry.ndim
    view = windows(x.reshape(n, groups, -1, *x.shape[2:]), geometry)
    return view.permute(1, 2, *range(3 + d, 3 + 2 * d), 0, *range(3, 3 + d))


def _copy_columns_(target: Tensor, x: Tensor, geometry: Geometry) -> None:
    """Copy the windows of some examples."""
    target.copy_(_columns(x, geometry))

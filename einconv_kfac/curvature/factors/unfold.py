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
        threads: Number of threads that copy some of the rows each.
    """
    n, channels, d = x.shape[0], x.shape[1] // geometry.groups, geometry.ndim
    view = windows(x.reshape(n, geometry.groups, channels, *x.shape[2:]), geometry)
    outputs, kernel = range(3, 3 + d), range(3 + d, 3 + 2 * d)
    view = view.permute(1, 2, *kernel, 0, *outputs)  # g ci *k n *o
    shape = (geometry.groups, -1, n * geometry.positions)
    if threads == 1:
        return view.reshape(shape)
    columns = view.new_empty(view.shape)
    dim = 1 if channels >= threads else 2
    parts = zip(columns.tensor_split(threads, dim), view.tensor_split(threads, dim))
    run_tasks([partial(target.copy_, source) for target, source in parts], threads)
    return columns.view(shape)

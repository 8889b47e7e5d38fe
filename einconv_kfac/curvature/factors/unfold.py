"""Windows of an input, as views of the zero-padded input; only the padding copies."""

from __future__ import annotations

from torch import Tensor

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


def unfolded(x: Tensor, geometry: Geometry) -> Tensor:
    """Return im2col per group, ``[g, (ci k), (n o)]``, from ``x`` of shape ``[n, c, *i]``."""
    n, channels, d = x.shape[0], x.shape[1] // geometry.groups, geometry.ndim
    view = windows(x.reshape(n, geometry.groups, channels, *x.shape[2:]), geometry)
    outputs, kernel = range(3, 3 + d), range(3 + d, 3 + 2 * d)
    view = view.permute(1, 2, *kernel, 0, *outputs)  # g ci *k n *o
    return view.reshape(geometry.groups, -1, n * geometry.positions)

"""Checks of the shapes of a convolution's tensors."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from einconv_kfac.geometry import Geometry
from einconv_kfac.geometry.spellings import as_integer
from einconv_kfac.network import Shape


def check_tensor(value: object, name: str) -> None:
    """Raise TypeError if an argument is no tensor, or one that is sparse or of a library."""
    if not isinstance(value, Tensor):
        raise TypeError(f"`{name}` must be a tensor, got {value!r}.")
    if value.layout is not torch.strided:
        raise TypeError(
            f"`{name}` must be a dense tensor, got the layout {value.layout}. Call `to_dense()`."
        )


def spatial_size(shape: Shape, name: str) -> Shape:
    """Return the sizes ``i`` of a shape ``[n, c, *i]``.

    Raises:
        ValueError: If there is none.
    """
    if len(shape) < 3:
        raise ValueError(
            f"`{name}` must have shape [batch, channels, *sizes] with at least one spatial "
            f"dimension, got {list(shape)}."
        )
    return shape[2:]


def check_kernel(weight: Shape, groups: int) -> None:
    """Raise ValueError if a kernel has no spatial dimension or does not split into groups."""
    as_integer(groups, "groups")
    if len(weight) < 3:
        raise ValueError(
            "`weight` must have shape [out_channels, in_channels / groups, *kernel_size], got "
            f"{list(weight)}."
        )
    if groups < 1 or weight[0] % groups:
        raise ValueError(
            f"`weight` must have out_channels divisible by groups={groups}, got {weight[0]}."
        )


def check_transposed_weight(weight: Shape, in_channels: int, ndim: int, groups: int) -> None:
    """Raise ValueError if the kernel of a transposed convolution does not match its input."""
    as_integer(groups, "groups")
    if len(weight) != ndim + 2 or weight[0] != in_channels:
        raise ValueError(
            "`weight` must have shape [in_channels, out_channels / groups, *kernel_size] with "
            f"the input's {in_channels} channels and {ndim} spatial dimensions, got "
            f"{list(weight)}."
        )
    if groups < 1 or in_channels % groups:
        raise ValueError(f"`groups` must divide the input's {in_channels} channels, got {groups}.")


def check_weight(weight: Shape, in_channels: int, ndim: int, groups: int) -> None:
    """Raise ValueError if a kernel does not match an input's channels and spatial dimensions."""
    as_integer(groups, "groups")
    if len(weight) != ndim + 2:
        raise ValueError(
            f"`weight` must have {ndim + 2} dimensions for an input with {ndim} spatial "
            f"dimensions, got shape {list(weight)}."
        )
    if groups < 1 or in_channels % groups or weight[1] * groups != in_channels:
        raise ValueError(
            "`weight` must have shape [out_channels, in_channels / groups, *kernel_size] with "
            f"groups={groups} and the input's {in_channels} channels, got {list(weight)}."
        )
    check_kernel(weight, groups)


def column_channels(columns: Shape, geometry: Geometry, name: str = "z") -> int:
    """Return the channels of columns ``[n, (c k), (o)]``.

    Raises:
        ValueError: If they are not of that shape.
    """
    entries = prod(geometry.kernel_size)
    if len(columns) != 3 or columns[1] % entries or columns[2] != geometry.positions:
        raise ValueError(
            f"`{name}` must have shape [batch, channels * {entries}, {geometry.positions}], got "
            f"{list(columns)}."
        )
    return columns[1] // entries


def check_output(v: Shape, batch: int | None, geometry: Geometry, name: str = "v") -> None:
    """Raise ValueError if a tensor does not have the shape of the convolution's output."""
    expected = ["batch" if batch is None else batch, "channels", *geometry.output_size]
    matches = len(v) == len(expected) and v[2:] == geometry.output_size
    if not matches or batch not in (None, v[0]):
        raise ValueError(
            f"`{name}` must have the shape of the output, [{', '.join(map(str, expected))}], "
            f"got {list(v)}."
        )

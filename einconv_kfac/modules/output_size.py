"""The output size of a transposed convolution, given in place of the output padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.expressions.shapes import check_tensor
from einconv_kfac.geometry import output_padding_of
from einconv_kfac.geometry.spellings import as_sizes


def output_padding_for(
    output_size: Sequence[int], x: Tensor, ndim: int, window: tuple[Any, Any, Any, Any]
) -> tuple[int, ...]:
    """Return the output padding with which the output of ``x`` has a size.

    Args:
        output_size: The output's positions, or its whole shape, as in
            ``torch.nn.ConvTranspose2d``.
        x: Input of shape ``[n, c, *o]``, or ``[c, *o]``.
        ndim: Number of spatial dimensions.
        window: Kernel size, stride, padding and dilation.

    Raises:
        ValueError: If no output padding gives the size, or the size has another length.
        TypeError: If the size is not integers, or ``x`` is no tensor.
    """
    check_tensor(x, "x")
    if not ndim < x.ndim <= ndim + 2:
        raise ValueError(
            f"`x` must have shape [batch, channels, *sizes] with {ndim} spatial dimensions, got "
            f"{list(x.shape)}."
        )
    inputs: Sequence[int] = x.shape[-ndim:]
    if torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
        # sizes are tensors then, and the trace keeps their values, as with torch's layer
        output_size, inputs = tuple(map(int, output_size)), tuple(map(int, inputs))
    sizes = as_sizes(output_size, "output_size", minimum=0)
    if len(sizes) not in (ndim, x.ndim):
        raise ValueError(
            f"`output_size` must have {ndim} or {x.ndim} entries, got {output_size!r}."
        )
    return output_padding_of(sizes[-ndim:], inputs, *window)

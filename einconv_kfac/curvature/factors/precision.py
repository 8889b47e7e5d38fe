"""The precision in which inputs and gradients enter factors."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import choice

Precision: TypeAlias = Literal["full", "bfloat16"]
PRECISIONS: tuple[str, ...] = get_args(Precision)


def rounded(x: Tensor, precision: str) -> Tensor:
    """Return a tensor in a precision.

    Raises:
        ValueError: If the precision is not one of `PRECISIONS`, or if it is lower than full and
            the tensor is in float64, whose factors have more.
    """
    if choice("precision", precision, PRECISIONS) == "full":
        return x
    if x.dtype == torch.float64:
        raise ValueError(
            f"`precision` must be 'full' for tensors in float64, got {precision!r}. Convert them "
            "to float32."
        )
    return x.to(torch.bfloat16)

"""Values and tangents of tensors in forward mode."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from einconv_kfac.torch_versions import make_dual


def parts(tensor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent; ``None`` has none."""
    if tensor is None:
        return None, None  # type: ignore[return-value]
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent


def times(tensor: Tensor, constant: Tensor) -> Tensor:
    """Return the product of a tensor, which may have a tangent, with a constant of its shape."""
    value, tangent = parts(tensor)
    if tangent is None or torch.is_grad_enabled():
        return tensor * constant
    return make_dual(value * constant, tangent * constant)

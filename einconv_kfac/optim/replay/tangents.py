"""Values and tangents of tensors in forward mode."""

from __future__ import annotations

from torch import Tensor
from torch.autograd import forward_ad


def parts(tensor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent; ``None`` has none."""
    if tensor is None:
        return None, None  # type: ignore[return-value]
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent

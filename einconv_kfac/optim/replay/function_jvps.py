"""Forward-mode differentiation of functions that torch differentiates slowly.

These are operations with constants (`constant_operands`); dropout, which is a product with a
constant on a CPU; and layer normalisation, whose Jacobian before scale and shift is symmetric, so
that its tangent is torch's backward kernel applied to ``dx``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from einconv_kfac.optim.replay.constant_operands import MULTIPLY, REVERSED, RULES, joined
from einconv_kfac.optim.replay.tangents import parts
from einconv_kfac.torch_versions import make_dual

_DROPOUT = {
    functional.dropout,
    functional.dropout1d,
    functional.dropout2d,
    functional.dropout3d,
}


class FunctionJvps(TorchFunctionMode):
    """A context in which tangents of these functions are computed as above, without gradients.

    Values are those of torch, and take the same random numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        found, kwargs = None, kwargs or {}
        if torch.is_grad_enabled() or torch._C._are_functorch_transforms_active():
            return func(*args, **kwargs)
        if func in RULES and len(args) == 2 and not kwargs:
            found = joined(RULES[func], *(args[::-1] if func in REVERSED else args))
        elif func in _DROPOUT:
            found = _dropped(func, *args, **kwargs)
        elif func is functional.layer_norm:
            found = _layer_normalized(*args, **kwargs)
        return func(*args, **kwargs) if found is None else found


def _dropped(drop: Any, x: Tensor, *args: Any, **options: Any) -> Tensor | None:
    """Return dropout of a tensor with a tangent, unless it overwrites that."""
    is_plain = x.is_cpu and not args and options.get("training") and not options.get("inplace")
    if not is_plain or parts(x)[1] is None:
        return None
    return joined(MULTIPLY, x, drop(torch.ones_like(x), **options))


def _layer_normalized(
    x: Tensor,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor | None:
    """Return the output of layer normalisation of a tensor with a tangent."""
    data, dx = parts(x)
    weight, d_weight = parts(weight)
    bias, d_bias = parts(bias)
    dtypes = {own.dtype for own in (data, weight, bias) if own is not None}
    if dx is None or len(dtypes) > 1 or torch.finfo(data.dtype).bits < 32:  # which autocast widens
        return None
    unit, mean, scale = torch.native_layer_norm(data, shape, None, None, eps)
    tangent, *_ = torch.ops.aten.native_layer_norm_backward(
        dx, data, shape, mean, scale, None, None, [True, False, False]
    )
    if weight is not None:
        tangent = tangent.mul_(weight)
    if d_weight is not None:
        tangent = tangent.addcmul_(unit, d_weight)
    if d_bias is not None:
        tangent = tangent.add_(d_bias)
    return make_dual(torch.native_layer_norm(data, shape, weight, bias, eps)[0], tangent)

"""Products of matrices, by the library that is fastest for them.

torch multiplies float32 matrices on x86 with Intel's MKL, which uses the full width of the
vector units on Intel's processors only. oneDNN, the library of torch's convolutions, uses it on
all processors: on others than Intel's, large products take half the time. oneDNN reads its
operands without a copy, unless one has gaps between its rows.

Where the device multiplies bfloat16 or float16 matrices with sums in float32, operands of these
types stay as they are. Their products are exact in float32, so that the result is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.operations import Operation
from einconv_kfac.torch_versions import multiplies_in_tf32

ONEDNN_LEAST_MACS = 1 << 20
"""Multiply-accumulates of a product from which the call of oneDNN costs less than it saves."""

WIDE_ROWS = 64
"""Rows and columns of a product from which oneDNN may reorder a transposed operand."""

SHORT_SUM_TERMS = 64
"""Terms of a product's sums up to which it costs no more than writing its result."""


LOW_PRECISION = (torch.bfloat16, torch.float16)
"""Types whose products are exact in float32."""


def operand_dtype(x: Tensor, result: torch.dtype) -> torch.dtype:
    """Return the type in which a tensor enters products whose sums have a type.

    It is the tensor's own where the device multiplies it without a copy in the result's type.
    """
    low = x.dtype in LOW_PRECISION and result == torch.float32
    return x.dtype if low and profile_of(x.device.type).has_mixed_products else result


def rounds_to_tf32(x: Tensor) -> bool:
    """Return whether products of a tensor in float32 are rounded to TF32 where it is.

    They follow torch's own setting: ``torch.backends.cuda.matmul``.
    """
    return profile_of(x.device.type).tf32_mac_price != 1.0 and multiplies_in_tf32()


def product(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix products ``[g, m, k] @ [g, k, n]``."""
    multiply = _one_dnn_for(left, right)
    if multiply is None:
        return left @ right
    left, right = (x if _is_dense(x) else x.contiguous() for x in (left, right))
    if len(left) == 1:
        return multiply(left[0], right[0].mT).unsqueeze(0)
    return torch.stack([multiply(a, b.mT) for a, b in zip(left, right)])


def product_of_three(left: Tensor, middle: Tensor, right: Tensor) -> Tensor:
    """Return the products ``left (middle right)``, see `product`."""
    return product(left, product(middle, right))


def add_matmul_(
    target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, rows: int = 0
) -> None:
    """Set ``target`` to ``beta target + alpha left right``, for batches of matrices.

    Operands are not copied to be multiplied faster, nor results of short sums, unless these are
    a part that fits a cache of a product with more ``rows``; all parts are then alike.
    """
    matmul(target, left, right, beta, alpha, rows)()


def matmul(
    target: Tensor, left: Tensor, right: Tensor, beta: float, alpha: float, rows: int = 0
) -> Operation:
    """Return the operation of `add_matmul_`, which may run several times and on any thread."""
    scales = {"beta": beta, "alpha": alpha}
    if target.shape[0] > 1:
        if left.dtype == target.dtype:
            return partial(target.baddbmm_, left, right, **scales)
        mixed = partial(torch.ops.aten.baddbmm.dtype_out, target, left, right, target.dtype)
        return partial(mixed, out=target, **scales)
    out, a, b = target[0], left[0], right[0]
    if left.dtype != target.dtype:
        mixed = partial(torch.ops.aten.addmm.dtype_out, out, a, b, out.dtype)
        return partial(mixed, out=out, **scales)
    worthwhile = rows or left.shape[-1] > SHORT_SUM_TERMS
    if worthwhile and is_for_one_dnn(left, right, rows) and _is_dense(left) and _is_dense(right):
        return partial(_add_by_one_dnn_, out, a, b.mT, **scales)
    return partial(out.addmm_, a, b, **scales)


def _add_by_one_dnn_(target: Tensor, x: Tensor, w: Tensor, beta: float, alpha: float) -> None:
    """Set ``target`` to ``beta target + alpha x w^T``."""
    if beta:
        target.mul_(beta).add_(_by_one_dnn(x, w), alpha=alpha)
    else:
        torch.mul(_by_one_dnn(x, w), alpha, out=target)


def _one_dnn_for(
    left: Tensor, right: Tensor, rows: int = 0
) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return ``x, w -> x @ w.T`` by oneDNN where that is faster."""
    return _by_one_dnn if is_for_one_dnn(left, right, rows) else None


def is_for_one_dnn(left: Tensor, right: Tensor, rows: int = 0) -> bool:
    """Return whether oneDNN computes a product, or a part of one with ``rows``, faster.

    Products by oneDNN have no derivatives.
    """
    rows, columns = rows or left.shape[1], right.shape[2]
    if rows * columns * left.shape[2] < ONEDNN_LEAST_MACS:
        return False
    single = left.dtype == right.dtype == torch.float32
    enabled = torch._C._get_mkldnn_enabled() and not torch.is_grad_enabled()
    if not (single and enabled and profile_of(left.device.type).multiplies_by_onednn):
        return False
    return left.is_contiguous() or min(rows, columns) >= WIDE_ROWS


def _by_one_dnn(x: Tensor, w: Tensor) -> Tensor:
    """Return ``x @ w.T``."""
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")
    return found


def _is_dense(matrices: Tensor) -> bool:
    """Return whether matrices have no gaps in memory, with which oneDNN is very slow."""
    return matrices.is_contiguous() or matrices.mT.is_contiguous()

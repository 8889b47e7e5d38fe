"""A convolution and its derivatives, as one differentiable function.

Input ``x``, kernel ``w`` and a vector ``v`` like the output have the trilinear form
``t = sum x P w v``. Its derivative with respect to one of the three is an operation: the forward
pass for ``v``, the input VJP (the transposed convolution) for ``x``, the weight VJP for ``w``.
The derivatives of these operations are again these operations.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.evaluate.kernels.selection import contract, others
from einconv_kfac.evaluate.operator import flattened, traced_convolution
from einconv_kfac.geometry import Geometry


def contract_convolution(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Return one of the three tensors of a convolution, contracted from the two others.

    It is differentiable to any order and in both modes, and composes with ``torch.func``.

    Args:
        geometry: The convolution.
        role: The tensor to return: ``"v"`` (forward pass), ``"x"`` (input VJP) or ``"w"``
            (weight VJP).
        first: The first of the others, in the order ``x`` ``[n, (g ci), *i]``, ``w``
            ``[(g co), ci, *k]``, ``v`` ``[n, (g co), *o]``.
        second: The second of the others.

    Returns:
        Tensor of the shape of ``role`` in this list.

    >>> from einconv_kfac.geometry import conv_geometry
    >>> geometry = conv_geometry((8, 8), kernel_size=3, stride=2)
    >>> contract_convolution(geometry, "v", torch.rand(2, 4, 8, 8), torch.rand(5, 4, 3, 3)).shape
    torch.Size([2, 5, 3, 3])
    """
    if torch.compiler.is_compiling():
        traced: Tensor = traced_convolution(role, flattened(geometry), first, second)
        return traced
    if not _differentiated(first, second):
        return contract(geometry, role, first, second)
    apply: Any = _Convolution.apply
    if not torch._C._are_functorch_transforms_active():
        # `Function.apply` ends in this call; before it, it binds a signature, which takes 0.1 ms
        base: Any = super(torch.autograd.Function, _Convolution)
        apply = base.apply
    result: Tensor = apply(geometry, role, first, second)
    return result


def _differentiated(first: Tensor, second: Tensor) -> bool:
    """Return whether autograd, forward mode or a transform records the operation."""
    recorded = torch.is_grad_enabled() and (first.requires_grad or second.requires_grad)
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return recorded or forward_mode or torch._C._are_functorch_transforms_active()


def _contracted(geometry: Geometry, role: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return one of the three tensors; ``tensors`` has the others, by role."""
    first, second = others(role)
    return contract_convolution(geometry, role, tensors[first], tensors[second])


class _Convolution(torch.autograd.Function):
    """The contraction, its derivatives in both modes, and its batching rule."""

    @staticmethod
    def forward(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
        """Contract."""
        return contract(geometry, role, first, second)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Save the operands for both modes."""
        ctx.geometry, ctx.role, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        """Contract the gradient, in the result's role, with the other operand."""
        gradients: list[Tensor | None] = []
        roles = others(ctx.role)
        for needed, role in zip(ctx.needs_input_grad[2:], roles):
            tensors = dict(zip(roles, ctx.saved_tensors)) | {ctx.role: gradient}
            gradients.append(_contracted(ctx.geometry, role, tensors) if needed else None)
        return (None, None, *gradients)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        """Contract each tangent with the other operand, and sum."""
        first, second = ctx.saved_tensors
        d_first, d_second = tangents[2:]
        pairs = [(d_first, second), (first, d_second)]
        terms = [
            contract_convolution(ctx.geometry, ctx.role, a, b)
            for a, b in pairs
            if a is not None and b is not None
        ]
        return terms[0] if len(terms) == 1 else terms[0] + terms[1]

    @staticmethod
    def vmap(
        info: Any,
        in_dims: tuple[Any, ...],
        geometry: Geometry,
        role: str,
        first: Tensor,
        second: Tensor,
    ) -> tuple[Tensor, int]:
        """Merge the mapped dimension into the batch or into the groups."""
        dims = dict(zip(others(role), in_dims[2:]))
        tensors = dict(zip(others(role), (first, second)))
        batch = ("x", "v")
        free = next(r for r in batch if r != role) if role in batch else None
        if free is not None and dims["w"] is None:
            merged = tensors[free].movedim(dims[free], 0)
            size, n = merged.shape[:2]
            tensors[free] = merged.flatten(0, 1)
            result = _contracted(geometry, role, tensors)
            return torch.unflatten(result, 0, (size, n)), 0
        return _mapped_as_groups(info.batch_size, geometry, role, tensors, dims), 0


def _mapped_as_groups(
    size: int, geometry: Geometry, role: str, tensors: dict[str, Tensor], dims: dict[str, Any]
) -> Tensor:
    """Contract with the mapped dimension merged into the groups, as their outer part."""
    grouped = {}
    for name, tensor in tensors.items():
        dim = dims[name]
        mapped = tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        at = 0 if name == "w" else 1  # w: [b, (g co), ..], the others: [n, b, (g c), ..]
        grouped[name] = mapped.movedim(0, at).flatten(at, at + 1)
    result = _contracted(replace(geometry, groups=size * geometry.groups), role, grouped)
    at = 0 if role == "w" else 1
    return torch.unflatten(result, at, (size, -1)).movedim(at, 0)

"""A convolution and its derivatives, as one differentiable function.

Input ``x``, kernel ``w`` and a vector ``v`` like the output have the trilinear form
``t = sum x P w v``. Its derivative with respect to one of the three is an operation: the forward
pass for ``v``, the input VJP (the transposed convolution) for ``x``, the weight VJP for ``w``.
The derivatives of these operations are again these operations. For complex tensors a VJP has the
conjugates of the tensors that are given, as in torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.evaluate.autocast import contract_as_given
from einconv_kfac.evaluate.kernels.selection import contract_by_torch, others
from einconv_kfac.evaluate.operator import conjugate, flattened, traced_convolution
from einconv_kfac.evaluate.recording import is_recorded, is_transformed
from einconv_kfac.geometry import Geometry

_unsafe_view: Any = torch.ops.aten._unsafe_view
"""A view that autograd takes for a tensor of its own, as the result of a matrix product is one."""


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
    if torch.compiler.is_compiling() and not is_transformed():
        return traced_convolution(role, flattened(geometry), first, second)
    if _is_batched(first) or _is_batched(second):
        return _with_batched_gradients(geometry, role, first, second)
    if is_recorded() and (first.is_floating_point() or first.is_complex()):
        return contract_by_torch(geometry, role, first, second)
    if not _differentiated(first, second):
        return contract_as_given(geometry, role, first, second)
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
    return recorded or is_transformed()


def _contracted(geometry: Geometry, role: str, tensors: dict[str, Tensor]) -> Tensor:
    """Return one of the three tensors; ``tensors`` has the others, by role."""
    first, second = others(role)
    return contract_convolution(geometry, role, tensors[first], tensors[second])


class _Convolution(torch.autograd.Function):
    """The contraction, its derivatives in both modes, and its batching rule."""

    @staticmethod
    def forward(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
        """Contract; a result that is a view could not be changed in place."""
        result = contract_as_given(geometry, role, first, second)
        return _unsafe_view(result, result.shape) if result._is_view() else result

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
        others_of_result = [conjugate(tensor) for tensor in ctx.saved_tensors]
        for needed, role in zip(ctx.needs_input_grad[2:], roles):
            tensors = dict(zip(roles, others_of_result)) | {ctx.role: gradient}
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
        """Contract with the mapped dimension merged into another."""
        dims = in_dims[2:]
        tensors = [t if dim is None else t.movedim(dim, 0) for t, dim in zip((first, second), dims)]
        mapped = [dim is not None for dim in dims]
        return _mapped(info.batch_size, geometry, role, tensors, mapped), 0


def _mapped(
    size: int, geometry: Geometry, role: str, pair: Sequence[Tensor], mapped: Sequence[bool]
) -> Tensor:
    """Contract tensors of which some have a mapped dimension, the first, as the result has.

    It is merged into the batch or into the groups.
    """
    tensors, is_mapped = dict(zip(others(role), pair)), dict(zip(others(role), mapped))
    batch = ("x", "v")
    free = next(r for r in batch if r != role) if role in batch else None
    if free is None or is_mapped["w"]:
        return _mapped_as_groups(size, geometry, role, tensors, is_mapped)
    sizes = tensors[free].shape[:2]
    tensors[free] = tensors[free].flatten(0, 1)
    return torch.unflatten(_contracted(geometry, role, tensors), 0, sizes)


def _mapped_as_groups(
    size: int, geometry: Geometry, role: str, tensors: dict[str, Tensor], mapped: dict[str, bool]
) -> Tensor:
    """Contract with the mapped dimension merged into the groups, as their outer part."""
    grouped = {}
    for name, tensor in tensors.items():
        copies = tensor if mapped[name] else tensor.expand(size, *tensor.shape)
        at = 0 if name == "w" else 1  # w: [b, (g co), ..], the others: [n, b, (g c), ..]
        grouped[name] = copies.movedim(0, at).flatten(at, at + 1)
    result = _contracted(replace(geometry, groups=size * geometry.groups), role, grouped)
    at = 0 if role == "w" else 1
    return torch.unflatten(result, at, (size, result.shape[at] // size)).movedim(at, 0)


def _is_batched(tensor: Tensor) -> bool:
    """Return whether a tensor is one of ``is_grads_batched=True``; `torch.func.vmap` has others.

    None is while a function is compiled, which cannot ask.
    """
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.is_legacy_batchedtensor(tensor)


def _with_batched_gradients(geometry: Geometry, role: str, first: Tensor, second: Tensor) -> Tensor:
    """Contract the tensors of ``is_grads_batched=True``, with their batch as a dimension.

    The levels of nested calls are searched from the innermost. A tensor without a level gets a
    dimension of size one, as a batch of one does, for which both are the same.
    """
    depth = torch._C._vmapmode_increment_nesting() - 1
    torch._C._vmapmode_decrement_nesting()
    pair = [first, second]
    for level in range(depth, 0, -1):
        tensors = [torch._remove_batch_dim(tensor, level, 1, 0) for tensor in pair]
        mapped = [len(tensor) != 1 for tensor in tensors]
        pair = [tensor if is_mapped else tensor[0] for tensor, is_mapped in zip(tensors, mapped)]
        if any(mapped):
            size = len(pair[mapped.index(True)])
            result = _mapped(size, geometry, role, pair, mapped)
            return torch._add_batch_dim(result, 0, level)
    return contract_convolution(geometry, role, *pair)

"""Products of a function's Jacobian with directions of its parameters.

Forward mode computes ``J d`` together with the output. Functions with an operator that has no
forward mode take two backward passes instead (Pearlmutter, 1994, in the form that needs no
forward mode): the gradient ``J^T w`` is linear in ``w``, so that ``J d`` is the derivative of
``<J^T w, d>`` with respect to ``w``. One graph then serves all directions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Generator, Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from einconv_kfac.optim.replay.environment import ONE_THREAD
from einconv_kfac.optim.vectors import Direction, entries, precise, sum_of
from einconv_kfac.torch_versions import load_forward_mode, make_dual

Function: TypeAlias = Callable[[Direction], tuple[Tensor, ...]]
"""Returns outputs for parameters; those that are not given keep their values."""
Tangents: TypeAlias = tuple[Tensor, ...]
"""``J d`` for each output, shaped like it."""


def forward_products(
    function: Function,
    parameters: Direction,
    directions: Sequence[Direction],
    *,
    with_gradients: bool = False,
) -> tuple[tuple[Tensor, ...], list[Tangents]]:
    """Return the outputs, and ``J d`` for each direction ``d``, in forward mode.

    Args:
        function: The function; it is evaluated once for each direction.
        parameters: Parameters by name.
        directions: The directions, at least one.
        with_gradients: Whether the function itself takes gradients.

    Raises:
        NotImplementedError: If an operator has no forward mode, or one that fails.
    """
    found = []
    try:
        for direction in directions:
            with torch.set_grad_enabled(with_gradients):
                found.append(_forward_product(function, parameters, direction))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:  # or the function fails without tangents as well
        with ONE_THREAD:
            is_new = load_forward_mode()
        if not is_new:
            raise NotImplementedError("Forward mode failed.") from error
        return forward_products(function, parameters, directions, with_gradients=with_gradients)
    return found[0][0], [tangents for _, tangents in found]


def _forward_product(
    function: Function, parameters: Direction, direction: Direction
) -> tuple[tuple[Tensor, ...], Tangents]:
    """Return the outputs and ``J d`` in forward mode."""
    own, scale = _in_range(direction, parameters)
    with ONE_THREAD, forward_ad.dual_level():
        duals = {
            name: make_dual(parameters[name].detach(), tangent) for name, tangent in own.items()
        }
        parts = [
            forward_ad.unpack_dual(output)  # type: ignore[no-untyped-call]
            for output in function(duals)
        ]
        outputs = tuple(primal.detach() for primal, _ in parts)
        tangents = [
            torch.zeros_like(output) if tangent is None else tangent.detach().clone()
            for output, (_, tangent) in zip(outputs, parts)
        ]
    return outputs, _rescaled(tangents, scale)


def _rescaled(tangents: Sequence[Tensor], scale: Tensor | None) -> Tangents:
    """Return tangents times the factor that `_in_range` divided their direction by."""
    return tuple(tangents if scale is None else [tangent * scale for tangent in tangents])


def _in_range(direction: Direction, parameters: Direction) -> tuple[Direction, Tensor | None]:
    """Return a direction in the parameters' dtypes, and the factor that it was divided by, if any.

    Parameters in low precision have a narrow range, so that the largest entry becomes 1.
    """
    dtypes = {name: parameters[name].dtype for name in direction}
    if all(dtype == precise(dtype) for dtype in dtypes.values()):
        return direction, None
    largest = torch.stack([entries(d).abs().amax() for d in direction.values() if d.numel()])
    scale = largest.amax().clamp_min(torch.finfo(largest.dtype).tiny)
    return {name: (d / scale).to(dtypes[name]) for name, d in direction.items()}, scale


def backward_products(
    function: Function, parameters: Direction, directions: Sequence[Direction]
) -> list[Tangents]:
    """Return ``J d`` for each direction ``d``, by two backward passes.

    Args:
        function: The function; it is evaluated once.
        parameters: Parameters by name.
        directions: The directions.

    Raises:
        RuntimeError: If the backward pass cannot be differentiated.
    """
    names = list(dict.fromkeys(name for d in directions for name in d))
    scaled = [_in_range(direction, parameters) for direction in directions]
    directions = [direction for direction, _ in scaled]
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().requires_grad_() for name in names}
        outputs = function(leaves)
        curved = [output for output in outputs if output.requires_grad]
        if not curved:
            return [tuple(torch.zeros_like(output) for output in outputs) for _ in directions]
        ws = [normal(output).requires_grad_() for output in curved]
        try:
            found = torch.autograd.grad(
                curved, [*leaves.values()], ws, create_graph=True, allow_unused=True
            )
            transposed = {n: g for n, g in zip(names, found) if g is not None}
            products = [_by_dual(transposed, ws, direction) for direction in directions]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one
            raise _refusal(str(error), curved) from error
    for direction, product in zip(directions, products):
        if not _is_adjoint(direction, product, transposed, ws):
            raise _refusal("<J d, w> differs from <d, J^T w>", curved)
    return [_rescaled(_completed(outputs, p), scale) for p, (_, scale) in zip(products, scaled)]


def _completed(outputs: Sequence[Tensor], product: Sequence[Tensor]) -> Tangents:
    """Return the tangents of all outputs, zero for those that depend on no parameter."""
    own = iter(product)
    return tuple(next(own) if o.requires_grad else torch.zeros_like(o) for o in outputs)


def _by_dual(transposed: Direction, ws: list[Tensor], direction: Direction) -> list[Tensor]:
    """Return the derivative of ``<J^T w, d>`` with respect to ``w``."""
    pairs = [(g, direction[n]) for n, g in transposed.items() if n in direction and g.requires_grad]
    if not pairs:
        return [torch.zeros_like(w) for w in ws]
    gradients, tangents = zip(*pairs)
    found = torch.autograd.grad(gradients, ws, tangents, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(w) if p is None else p.detach() for w, p in zip(ws, found)]


def normal(like: Tensor) -> Tensor:
    """Return a fixed vector of normal numbers; the global random state is left alone."""
    generator = Generator(like.device).manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _is_adjoint(
    direction: Direction, product: Sequence[Tensor], transposed: Direction, ws: Sequence[Tensor]
) -> bool:
    """Return whether ``<J d, w> = <d, J^T w>``: not where a backward pass is not differentiable."""
    left = sum_of([inner(p, w) for p, w in zip(product, ws)])
    pairs = [(direction[name], g.detach()) for name, g in transposed.items() if name in direction]
    right = sum((inner(d, g) for d, g in pairs), torch.zeros_like(left))
    bound = sum((inner(d, d) for d, _ in pairs), torch.zeros_like(left))
    bound = (bound * sum((inner(g, g) for _, g in pairs), torch.zeros_like(left))).sqrt()
    eps = torch.finfo(ws[0].dtype).eps
    size = sum_of([p.double().norm() for p in product])
    allowed = 10 * eps**0.5 * (size + right.abs()) + 10 * eps * bound
    return bool((left - right).abs() <= allowed) or not bool((left - right).isfinite())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors, in float64."""
    return (entries(a.detach()).double() * entries(b.detach()).double()).sum()


def _refusal(why: str, outputs: Sequence[Tensor]) -> RuntimeError:
    """Return the error for a model without Jacobian-vector products, which names its functions."""
    named = " or ".join(f"`{name}`" for name in _functions_without_jvp(outputs))
    return RuntimeError(
        "The model must have Jacobian-vector products when adaptive=True, got an operator "
        "without forward-mode derivative whose backward pass cannot be differentiated: "
        f"{why.rstrip('.')}. Give {named or 'the custom `autograd.Function`'} a `jvp`, or a "
        "`backward` made of differentiable operations without `once_differentiable`, call torch's "
        "operations in its place, or pass adaptive=False."
    )


def _functions_without_jvp(outputs: Sequence[Tensor]) -> list[str]:
    """Return the names of the functions of users without a `jvp` that outputs depend on."""
    found: dict[str, None] = {}
    seen: set[Node] = set()
    left = [output.grad_fn for output in outputs]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        function = getattr(node, "_forward_cls", None)
        if function is not None and function.jvp is torch.autograd.Function.jvp:
            found[function.__name__] = None
        left += [parent for parent, _ in node.next_functions]
    return list(found)

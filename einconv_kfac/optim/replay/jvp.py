"""Products of a function's Jacobian with directions of its parameters.

Forward mode computes ``J d`` together with the output. Functions with an operator that has no
forward mode take two backward passes instead (Pearlmutter, 1994, in the form that needs no
forward mode): the gradient ``J^T w`` is linear in ``w``, so that ``J d`` is the derivative of
``<J^T w, d>`` with respect to ``w``. One graph then serves all directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeAlias

import torch
from torch import Generator, Tensor
from torch.autograd import forward_ad

from einconv_kfac.optim.replay.environment import ONE_THREAD
from einconv_kfac.optim.vectors import Direction

Function: TypeAlias = Callable[[Direction], Tensor]
"""Returns an output for parameters; those that are not given keep their values."""


def forward_products(
    function: Function, parameters: Direction, directions: Sequence[Direction]
) -> list[Tensor]:
    """Return ``J d``, shaped like the output, for each direction ``d``, in forward mode.

    Args:
        function: The function; it is evaluated once for each direction.
        parameters: Parameters by name.
        directions: The directions.

    Raises:
        NotImplementedError: If an operator has no forward mode.
    """
    _load_forward_mode()
    return [_forward_product(function, parameters, direction) for direction in directions]


@cache
def _load_forward_mode() -> None:
    """Make torch compile its forward-mode formulas, and hide its warning about the compiler."""
    with ONE_THREAD, warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def _forward_product(function: Function, parameters: Direction, direction: Direction) -> Tensor:
    """Return ``J d`` in forward mode."""
    with ONE_THREAD, torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(  # type: ignore[no-untyped-call]
                parameters[name].detach(), tangent
            )
            for name, tangent in direction.items()
        }
        output = function(duals)
        tangent = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
        return torch.zeros_like(output) if tangent is None else tangent.clone()


def backward_products(
    function: Function, parameters: Direction, directions: Sequence[Direction]
) -> list[Tensor]:
    """Return ``J d``, shaped like the output, for each direction ``d``, by two backward passes.

    Args:
        function: The function; it is evaluated once.
        parameters: Parameters by name.
        directions: The directions.

    Raises:
        RuntimeError: If the backward pass cannot be differentiated.
    """
    names = list(dict.fromkeys(name for d in directions for name in d))
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().requires_grad_() for name in names}
        output = function(leaves)
        if not output.requires_grad:
            return [torch.zeros_like(output) for _ in directions]
        w = _normal(output).requires_grad_()
        try:
            found = torch.autograd.grad(
                output, [*leaves.values()], w, create_graph=True, allow_unused=True
            )
            transposed = {n: g for n, g in zip(names, found) if g is not None}
            products = [_by_dual(transposed, w, direction) for direction in directions]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # NotImplementedError is one
            raise _refusal(str(error)) from error
    for direction, product in zip(directions, products):
        _check_adjoint(direction, product, transposed, w)
    return products


def _by_dual(transposed: Direction, w: Tensor, direction: Direction) -> Tensor:
    """Return the derivative of ``<J^T w, d>`` with respect to ``w``."""
    pairs = [(g, direction[n]) for n, g in transposed.items() if n in direction and g.requires_grad]
    if not pairs:
        return torch.zeros_like(w)
    gradients, tangents = zip(*pairs)
    (product,) = torch.autograd.grad(gradients, w, tangents, retain_graph=True, allow_unused=True)
    return torch.zeros_like(w) if product is None else product.detach()


def _normal(like: Tensor) -> Tensor:
    """Return a fixed vector of normal numbers; the global random state is left alone."""
    generator = Generator(like.device).manual_seed(0)
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


def _check_adjoint(direction: Direction, product: Tensor, transposed: Direction, w: Tensor) -> None:
    """Check ``<J d, w> = <d, J^T w>``, which fails where a backward pass is not differentiable."""
    left = _inner(product, w)
    pairs = [(direction[name], g.detach()) for name, g in transposed.items() if name in direction]
    right = sum((_inner(d, g) for d, g in pairs), torch.zeros_like(left))
    bound = sum((_inner(d, d) for d, _ in pairs), torch.zeros_like(left))
    bound = (bound * sum((_inner(g, g) for _, g in pairs), torch.zeros_like(left))).sqrt()
    eps = torch.finfo(w.dtype).eps
    allowed = 10 * eps**0.5 * (product.double().norm() + right.abs()) + 10 * eps * bound
    if not bool((left - right).abs() <= allowed) and bool((left - right).isfinite()):
        raise _refusal("<J d, w> differs from <d, J^T w>")


def _inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two tensors, in float64."""
    return (a.detach().double() * b.detach().double()).sum()


def _refusal(why: str) -> RuntimeError:
    """Return the error for a model without Jacobian-vector products."""
    return RuntimeError(
        "The model must have Jacobian-vector products when adaptive=True, got an operator "
        f"without forward-mode derivative whose backward pass cannot be differentiated: {why}. "
        "Give the custom `autograd.Function` a `jvp`, or a `backward` made of differentiable "
        "operations without `once_differentiable`, or pass adaptive=False."
    )

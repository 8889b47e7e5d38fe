"""Products of a model's Jacobian with directions of its parameters, on one recorded batch.

Forward mode computes ``J d`` beside the output. Where an operator of the model has no forward
mode, two backward passes do (Pearlmutter, 1994, in the form that needs no forward mode): the
gradient ``J^T w`` is linear in ``w``, so that ``J d`` is the derivative of ``<J^T w, d>`` by
``w``. One graph serves all directions then.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache

import torch
from torch import Generator, Tensor
from torch.autograd import forward_ad

from einconv_kfac.optim.replay.recorder import Batch, Recorder
from einconv_kfac.optim.vectors import Direction


def jacobian_products(
    recorder: Recorder, batch: Batch, parameters: Direction, directions: Sequence[Direction]
) -> list[Tensor]:
    """Return ``J d``, shaped like the output of the batch's portion, for each direction ``d``.

    Once an operator without forward mode was met, the recorder does without from then on.

    Args:
        recorder: Runs the model again.
        batch: The batch.
        parameters: Parameters by name.
        directions: The directions.

    Raises:
        RuntimeError: If the model cannot be differentiated in either way, or does not repeat
            its output.
    """
    if recorder.forward_mode:
        try:
            return [_forward_product(recorder, batch, parameters, d) for d in directions]
        except NotImplementedError:
            recorder.forward_mode = False
    return _backward_products(recorder, batch, parameters, directions)


def check_products(
    recorder: Recorder, batches: Sequence[Batch], parameters: Direction, direction: Direction
) -> None:
    """Raise what `jacobian_products` raises; what costs time is checked once for a recorder.

    The model must repeat its output, by computing all of its layers.
    """
    for batch in batches:
        recorder.check_batch(batch)
    if not recorder.products_checked:
        _check_repeated(batches[0], recorder.repeat(batches[0], {}))
        jacobian_products(recorder, batches[0], parameters, [direction])
        recorder.products_checked = True


@cache
def _load_forward_mode() -> None:
    """Let torch compile its forward-mode formulas; it warns about its own compiler."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def _forward_product(
    recorder: Recorder, batch: Batch, parameters: Direction, direction: Direction
) -> Tensor:
    """Return ``J d`` in forward mode."""
    _load_forward_mode()
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(  # type: ignore[no-untyped-call]
                parameters[name].detach(), tangent
            )
            for name, tangent in direction.items()
        }
        output = recorder.tangent(batch, duals)
        tangent = forward_ad.unpack_dual(output).tangent  # type: ignore[no-untyped-call]
        return torch.zeros_like(output) if tangent is None else tangent.clone()


def _backward_products(
    recorder: Recorder, batch: Batch, parameters: Direction, directions: Sequence[Direction]
) -> list[Tensor]:
    """Return ``J d`` by two backward passes."""
    names = list(dict.fromkeys(name for d in directions for name in d))
    with torch.enable_grad():
        leaves = {name: parameters[name].detach().requires_grad_() for name in names}
        output = recorder.repeat(batch, leaves)
        _check_repeated(batch, output)
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
    """Return the derivative of ``<J^T w, d>`` by ``w``."""
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


def _check_repeated(batch: Batch, output: Tensor) -> None:
    """Check that a forward pass that ran again gave the output that it had given."""
    assert batch.forward is not None
    _, lowered, dtype = batch.forward.surroundings.autocast
    eps = torch.finfo(dtype if lowered else output.dtype).eps
    expected = batch.output if batch.portion is None else batch.output[batch.portion.rows]
    expected, value = expected.double(), output.detach().double()
    allowed = min(10 * eps**0.5, 0.1) * expected.norm()
    if value.shape == expected.shape and not bool((value - expected).norm() > allowed):
        return
    if batch.portion is not None:
        raise RuntimeError(
            "`curvature_fraction` below 1 needs a model that treats every example alone, got "
            "another output for a part of the batch than for the whole: a layer mixes examples, "
            "or draws random numbers otherwise than nn.Dropout. Pass curvature_fraction=1."
        )
    raise RuntimeError(
        "The model must repeat its output when it runs again on a recorded batch with "
        "adaptive=True, got another one. Draw random numbers from torch's global generator, "
        "keep no state between calls but in buffers, change no output in place, run attention "
        "with dropout under `sdpa_kernel(SDPBackend.MATH)` and recurrent layers with dropout "
        "without cuDNN, or pass adaptive=False."
    )


def _refusal(why: str) -> RuntimeError:
    """Return the error of a model that cannot be differentiated as the products need it."""
    return RuntimeError(
        "adaptive=True needs Jacobian-vector products, but the model has an operator without "
        f"forward-mode derivative, and its backward pass cannot be differentiated: {why}. Give "
        "the custom `autograd.Function` a `jvp`, or a `backward` made of differentiable "
        "operations without `once_differentiable`, or pass adaptive=False."
    )

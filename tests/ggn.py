"""The GGN and the Fisher by their definition: Jacobians of the model, Hessian of the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.modules.conv import _ConvTransposeNd


def matrix(module: nn.Module, weight: Tensor) -> Tensor:
    """A stack of tensors like the weight, ``[f, *w]``, as ``[f, g, co, d]``."""
    groups = getattr(module, "groups", 1)
    if isinstance(module, _ConvTransposeNd):  # f (g ci) co *k
        return weight.unflatten(1, (groups, -1)).flatten(4).transpose(2, 3).flatten(3)
    if isinstance(module, nn.Embedding):
        return weight.mT.unsqueeze(1)
    if weight.ndim == 2 or isinstance(module, nn.LayerNorm):  # one group per channel
        return weight.flatten(1)[:, :, None, None]
    return weight.unflatten(1, (groups, -1)).flatten(3)


def jacobian(model: nn.Module, name: str, *inputs: Any) -> Tensor:
    """Jacobian of the flattened output by one module's parameters, ``[f, g, (co d)]``."""
    module = model.get_submodule(name)
    prefix = f"{name}." if name else ""
    own = {prefix + key: p.detach() for key, p in module.named_parameters(recurse=False)}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
        result: Tensor = functional_call(model, {**buffers, **parameters}, inputs)
        return result.flatten()

    rows = jacrev(output)(own)
    result = matrix(module, rows[f"{prefix}weight"])
    if f"{prefix}bias" in rows:
        bias = rows[f"{prefix}bias"].reshape(*result.shape[:3], 1)
        result = torch.cat([result, bias], dim=-1)
    return result.flatten(2).detach()


def loss_hessian(loss_fn: nn.Module, output: Tensor, target: Tensor) -> Tensor:
    """Hessian of the loss by the flattened output, ``[f, f]``."""

    def loss(flat: Tensor) -> Tensor:
        value: Tensor = loss_fn(flat.reshape(output.shape), target)
        return value

    hessian: Tensor = torch.autograd.functional.hessian(loss, output.detach().flatten())
    return hessian


def dense_ggn(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, name: str) -> Tensor:
    """The exact GGN block of one module, ``[g, co * d, co * d]``."""
    rows = jacobian(model, name, x)
    hessian = loss_hessian(loss_fn, model(x), y)
    return torch.einsum("fgp,fh,hgq->gpq", rows, hessian, rows)


def dense_empirical(
    model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor, name: str
) -> Tensor:
    """The exact empirical Fisher block of one module for the loss ``loss_fn``, by examples.

    It is the sum of ``g_n g_n^T`` over the gradients of the examples' own losses, divided by
    their number where the loss is a mean.
    """
    n = x.shape[0]
    total = torch.zeros((), dtype=x.dtype)
    for start in range(n):
        part = slice(start, start + 1)
        output = model(x[part]).detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_fn(output, y[part]), output)
        gradient = torch.einsum("f,fgp->gp", slope.flatten(), jacobian(model, name, x[part]))
        total = total + gradient[:, :, None] * gradient[:, None, :]
    return total / n if getattr(loss_fn, "reduction", "mean") == "mean" else total

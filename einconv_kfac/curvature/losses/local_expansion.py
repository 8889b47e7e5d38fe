"""The second-order expansion of a loss at the model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.losses.loss_call import (
    in_precision,
    precise_type,
    targets_in_precision,
    targets_of,
)
from einconv_kfac.curvature.losses.loss_registry import found_rule
from einconv_kfac.curvature.losses.loss_rule import TorchLossRule


class LocalExpansion(NamedTuple):
    """Derivatives of a loss at an output ``[n, *f]``, in at least float32.

    Args:
        gradient: The gradient, ``[n, *f]``.
        products: The curvature times each vector, ``[n, *f]``.
    """

    gradient: Tensor
    products: list[Tensor]


def local_expansion(
    loss: nn.Module, output: Tensor, target: Any, vectors: Sequence[Tensor]
) -> LocalExpansion:
    """Return the gradient of a loss at ``output [n, *f]``, and its curvature times vectors.

    The curvature is the Hessian of the loss by autograd, or the Fisher information for
    probabilities and log-probabilities (``BCELoss``, ``NLLLoss``, ``KLDivLoss``), whose Hessian
    at the output is not that by the scores, or vanishes. Scores of ``-inf`` have none.

    Args:
        loss: The loss; no hook of it is called. Its buffers may have another type.
        output: The output.
        target: The target, or a tuple of several.
        vectors: The vectors, ``[n, *f]``.
    """
    precise = precise_type(output)
    vectors = [vector.to(precise) for vector in vectors]
    closed = _closed_products(loss, output.detach(), target, vectors)
    targets = targets_in_precision(targets_of(target), precise)
    with torch.enable_grad():
        finite = output.detach().to(precise).clamp_min(torch.finfo(precise).min)
        entries = finite.requires_grad_()
        value = in_precision(loss, precise).forward(entries, *targets)
        (slope,) = torch.autograd.grad(value, entries, create_graph=closed is None)
    if closed is not None:
        return LocalExpansion(slope, closed)
    if not slope.requires_grad:
        return LocalExpansion(slope, [torch.zeros_like(vector) for vector in vectors])
    products = [torch.autograd.grad(slope, entries, v, retain_graph=True)[0] for v in vectors]
    return LocalExpansion(slope.detach(), products)


def _closed_products(
    loss: nn.Module, output: Tensor, target: Any, vectors: Sequence[Tensor]
) -> list[Tensor] | None:
    """Return the products in closed form, or ``None`` if the rule has none."""
    rule = found_rule(loss)
    if not isinstance(rule, TorchLossRule):
        return None
    found = [rule.closed_product(loss, output, target, v) for v in vectors]
    products = [product for product in found if product is not None]
    return products if len(products) == len(vectors) else None

"""Products of the curvature of a loss at the model's output with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

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


def curvature_products(
    loss: nn.Module, output: Tensor, target: Any, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the curvature of a loss at ``output [n, *f]`` times vectors ``[n, *f]``.

    It is the Hessian of the loss by autograd, or the Fisher information for probabilities and
    log-probabilities (``BCELoss``, ``NLLLoss``, ``KLDivLoss``), whose Hessian at the output is
    not that by the scores, or vanishes. Scores of ``-inf`` have no curvature.

    Args:
        loss: The loss; no hook of it is called.
        output: The output.
        target: The target, or a tuple of several.
        vectors: The vectors.

    Returns:
        The products ``[n, *f]``, in at least float32.
    """
    precise, rule = precise_type(output), found_rule(loss)
    vectors = [vector.to(precise) for vector in vectors]
    if isinstance(rule, TorchLossRule):
        found = [rule.closed_product(loss, output.detach(), target, v) for v in vectors]
        if all(product is not None for product in found):
            return [product for product in found if product is not None]
    targets = targets_in_precision(targets_of(target), precise)
    with torch.enable_grad():
        finite = output.detach().to(precise).clamp_min(torch.finfo(precise).min)
        entries = finite.requires_grad_()
        value = in_precision(loss, precise).forward(entries, *targets)
        (slope,) = torch.autograd.grad(value, entries, create_graph=True)
    if not slope.requires_grad:
        return [torch.zeros_like(vector) for vector in vectors]
    return [torch.autograd.grad(slope, entries, v, retain_graph=True)[0] for v in vectors]

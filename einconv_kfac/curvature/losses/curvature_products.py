"""Products of the curvature of a loss at the model's output with vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.losses.loss_call import (
    in_precision,
    precise_type,
    targets_of,
)
from einconv_kfac.curvature.losses.loss_registry import found_rule
from einconv_kfac.curvature.losses.loss_rule import TorchLossRule


def curvature_products(
    loss: nn.Module, output: Tensor, target: Any, vectors: Sequence[Tensor]
) -> list[Tensor]:
    """Return the curvature of a loss at ``output [n, *f]`` times vectors ``[n, *f]``.

    It is the Hessian of the loss by autograd, or the Fisher information where the rule for the
    loss states that: for probabilities and log-probabilities. The Hessian of the former is not
    that by the scores, and that of the latter vanishes.

    Returns:
        The products ``[n, *f]``, in at least float32.
    """
    precise, rule = precise_type(output), found_rule(loss)
    vectors = [vector.to(precise) for vector in vectors]
    if isinstance(rule, TorchLossRule):
        found = [rule.fisher_product(loss, output.detach(), target, v) for v in vectors]
        if None not in found:
            return [product for product in found if product is not None]
    with torch.enable_grad():
        entries = output.detach().to(precise).requires_grad_()
        value = in_precision(loss, precise).forward(entries, *targets_of(target))
        (slope,) = torch.autograd.grad(value, entries, create_graph=True)
    if not slope.requires_grad:
        return [torch.zeros_like(vector) for vector in vectors]
    return [torch.autograd.grad(slope, entries, v, retain_graph=True)[0] for v in vectors]

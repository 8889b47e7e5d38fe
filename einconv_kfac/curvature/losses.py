"""The curvature of a loss with respect to the model's output.

A loss of ``N`` examples is ``L = sum_j c_j l_j``: terms ``l_j`` (one per example, pixel,
token or output entry) with weights ``c_j`` that contain the mean or the sum, class weights
and ignored targets. Each function here returns *root vectors* ``s`` of shape
``[v, *output]`` with ``sum_v s s^T`` equal to the Hessian of ``L`` with respect to the
output, exactly or in expectation. Root vectors of different terms never mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class LossRule:
    """How one type of loss is sampled and factored.

    Args:
        sampled: Draws ``v`` root vectors, unbiased.
        exact: Gives the root vectors that reproduce the Hessian.
    """

    sampled: Callable[[Any, Tensor, Tensor, int, Generator], Tensor]
    exact: Callable[[Any, Tensor, Tensor], Tensor]


def _class_weights(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor:
    """Return the weight of each term ``c_j`` as ``[n, *d]``, as torch defines the reduction."""
    classes = output.shape[1]
    weight = output.new_ones(classes) if loss.weight is None else loss.weight.to(output.dtype)
    smoothing = loss.label_smoothing
    if target.is_floating_point():
        terms = torch.tensordot(target.to(output.dtype), weight, dims=([1], [0]))  # [n, *d]
        total = terms.new_tensor(terms.numel())
    else:
        kept = target != loss.ignore_index
        terms = weight[target.where(kept, 0)] * kept  # [n, *d]
        total = terms.sum()
    smooth = weight.sum() / classes * (1 if target.is_floating_point() else kept)
    terms = (1 - smoothing) * terms + smoothing * smooth
    result: Tensor = terms / total if loss.reduction == "mean" else terms
    return result


def _sampled_cross_entropy(
    loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor, samples: int, generator: Generator
) -> Tensor:
    """Draw classes from the model: ``sqrt(c) (p - onehot)``."""
    probabilities = output.softmax(dim=1).movedim(1, -1)  # [n, *d, c]
    rows = probabilities.flatten(end_dim=-2)
    draws = torch.multinomial(rows, samples, replacement=True, generator=generator)  # [(n d), v]
    onehot = functional.one_hot(draws.T, rows.shape[1]).to(output.dtype)  # [v, (n d), c]
    roots = (rows - onehot).reshape(samples, *probabilities.shape).movedim(-1, 2)  # [v, n, c, *d]
    scale = (_class_weights(loss, output, target) / samples).sqrt()
    return roots * scale.unsqueeze(1)


def _exact_cross_entropy(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor:
    """One root vector per class: ``sqrt(c p_v) (onehot_v - p)``."""
    probabilities = output.softmax(dim=1)
    classes = output.shape[1]
    eye = torch.eye(classes, dtype=output.dtype, device=output.device)
    eye = eye.reshape(classes, 1, classes, *[1] * (output.ndim - 2))
    weight = (_class_weights(loss, output, target).unsqueeze(1) * probabilities).sqrt()
    return (eye - probabilities) * weight.movedim(1, 0).unsqueeze(2)  # [v, n, c, *d]


def _squared_error_weight(loss: nn.MSELoss, output: Tensor) -> float:
    """Return the curvature ``2 c`` of one term."""
    return 2.0 / output.numel() if loss.reduction == "mean" else 2.0


def _sampled_squared_error(
    loss: nn.MSELoss, output: Tensor, target: Tensor, samples: int, generator: Generator
) -> Tensor:
    """Draw standard normal vectors times ``sqrt(2 c)``."""
    shape = (samples, *output.shape)
    noise = torch.randn(shape, generator=generator, dtype=output.dtype, device=output.device)
    return noise * sqrt(_squared_error_weight(loss, output) / samples)


def _exact_squared_error(loss: nn.MSELoss, output: Tensor, target: Tensor) -> Tensor:
    """One root vector per output entry of an example."""
    entries = output[0].numel()
    eye = torch.eye(entries, dtype=output.dtype, device=output.device)
    roots = eye.reshape(entries, 1, *output.shape[1:]).expand(entries, *output.shape)
    return roots * sqrt(_squared_error_weight(loss, output))


_RULES: dict[type[nn.Module], LossRule] = {
    nn.CrossEntropyLoss: LossRule(_sampled_cross_entropy, _exact_cross_entropy),
    nn.MSELoss: LossRule(_sampled_squared_error, _exact_squared_error),
}


def loss_rule(loss: nn.Module) -> LossRule:
    """Return the rule for a loss.

    Raises:
        ValueError: If no rule covers its type, or its reduction is ``"none"``.
    """
    rule = next((rule for kind, rule in _RULES.items() if isinstance(loss, kind)), None)
    if rule is None:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise ValueError(
            f"`loss_fn` must be one of {known}, got {type(loss).__name__}. "
            "fisher='empirical' takes any loss."
        )
    check_reduction(loss)
    return rule


def check_reduction(loss: nn.Module) -> str:
    """Return ``"mean"`` or ``"sum"``.

    Raises:
        ValueError: If the loss has another reduction.
    """
    reduction = getattr(loss, "reduction", "mean")
    if reduction not in {"mean", "sum"}:
        raise ValueError(f"`loss_fn.reduction` must be 'mean' or 'sum', got {reduction!r}.")
    return str(reduction)

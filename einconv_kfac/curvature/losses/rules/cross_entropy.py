"""Cross entropy of class scores ``[n, c, *d]``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.class_scores import (
    by_position,
    check_scores,
    class_weights,
    drawn,
)
from einconv_kfac.curvature.losses.loss_rule import LossExample, TorchLossRule


def _labels(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores of three classes at two positions, and labels."""
    scores = torch.randn(4, 3, 2, generator=generator, dtype=torch.float64)
    return scores, torch.randint(3, (4, 2), generator=generator)


def _probabilities(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores of three classes, and soft targets."""
    scores = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    return scores[0], scores[1].softmax(dim=1)


class CrossEntropyRule(TorchLossRule):
    """``torch.nn.CrossEntropyLoss``: the Hessian of a term is ``c (diag(p) - p p^T)``.

    The weight ``c`` of a term holds class weights, label smoothing and soft targets; samples
    are classes drawn from the model.
    """

    kinds = (nn.CrossEntropyLoss,)
    examples = (
        LossExample(partial(nn.CrossEntropyLoss, label_smoothing=0.1, ignore_index=1), _labels),
        LossExample(nn.CrossEntropyLoss, _probabilities),
    )

    def roots(self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(c p_v) (onehot_v - p)`` for every class and position."""
        check_scores(output)
        p = output.softmax(dim=1)
        scale = (_term_weights(loss, output, target).unsqueeze(1) * p).sqrt()  # n c *d
        classes = torch.arange(output.shape[1], device=output.device)
        for v in range(output.shape[1]):
            onehot = (classes == v).reshape(-1, *[1] * (output.ndim - 2))
            yield from by_position((onehot.to(p) - p) * scale[:, v : v + 1])

    def sample(
        self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor, generator: Generator
    ) -> Tensor:
        """Draw classes from the model: ``sqrt(c) (p - onehot)``."""
        check_scores(output)
        p = output.softmax(dim=1)
        scale = _term_weights(loss, output, target).sqrt().unsqueeze(1)
        return (p - drawn(p, generator)) * scale


def _term_weights(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor:
    """Return the weight ``c`` of each term, ``[n, *d]``, as torch defines it."""
    weight, smoothing = class_weights(loss, output), loss.label_smoothing
    smooth = smoothing * weight.mean()
    if target.is_floating_point():
        terms: Tensor = torch.tensordot(target.to(weight), weight, dims=([1], [0]))
        terms = (1 - smoothing) * terms + smooth
        return terms / terms.numel() if loss.reduction == "mean" else terms
    kept = target != loss.ignore_index
    terms = weight[target.where(kept, 0)] * kept
    total = terms.sum() if loss.reduction == "mean" else 1
    return ((1 - smoothing) * terms + smooth * kept) / total

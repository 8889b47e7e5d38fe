"""Cross entropy of the probabilities of independent events."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.diagonal_rule import DiagonalRule
from einconv_kfac.curvature.losses.loss_call import (
    check_batch,
    check_not_negative,
    constant_targets,
    precise_type,
    weighted_entries,
)
from einconv_kfac.curvature.losses.loss_rule import Link, LossExample

_LEAST_VARIANCE = 1e-12
"""Torch bounds ``p (1 - p)`` by it in the gradient of the loss."""


def _events(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores ``[4, 3]`` and probabilities as targets."""
    scores = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64)
    return scores[0], scores[1].sigmoid()


class BernoulliRule(DiagonalRule):
    """``torch.nn.BCELoss``: the Fisher information of a probability is ``c / (p (1 - p))``.

    It gives the model the same curvature as ``BCEWithLogitsLoss`` does. The Hessian by the
    probability is another matrix, since the sigmoid is curved.
    """

    kinds = (nn.BCELoss,)
    examples = (LossExample(nn.BCELoss, _events, torch.sigmoid),)

    def diagonal(
        self, loss: nn.BCELoss, output: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return ``c / (p (1 - p))``; it is finite, and its root is in the type of the output."""
        (target,) = constant_targets(target)
        check_batch(output, target)
        p = output.to(precise_type(output))
        own = torch.ones_like(p) if loss.weight is None else loss.weight.to(p).expand_as(p)
        terms = weighted_entries(loss, own, p.numel(), weights)
        check_not_negative("The weights of `loss_fn`", terms)
        least = max(_LEAST_VARIANCE, (100 / torch.finfo(output.dtype).max) ** 2)
        return terms / (p * (1 - p)).clamp_min(least)

    def canonical(self, loss: nn.BCELoss, output: Tensor, target: Tensor) -> tuple[Tensor, Link]:
        """See `TorchLossRule`."""
        return torch.logit(output, eps=torch.finfo(output.dtype).eps), torch.sigmoid

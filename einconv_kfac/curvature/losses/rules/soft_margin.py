"""Logistic loss of scores for targets of -1 and 1."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.diagonal_rule import DiagonalRule
from einconv_kfac.curvature.losses.loss_call import (
    check_batch,
    constant_targets,
    precise_type,
    weighted_entries,
)
from einconv_kfac.curvature.losses.loss_rule import LossExample


def _signs(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores ``[4, 3]`` and signs."""
    scores = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    return scores, 2.0 * torch.randint(2, (4, 3), generator=generator) - 1


class SoftMarginRule(DiagonalRule):
    """``torch.nn.SoftMarginLoss``, ``log(1 + exp(-y f))``, with Hessian ``c y^2 p (1 - p)``.

    ``p`` is the sigmoid of ``y f``. Autograd returns NaN for large scores.
    """

    kinds = (nn.SoftMarginLoss,)
    examples = (LossExample(nn.SoftMarginLoss, _signs),)

    def diagonal(
        self, loss: nn.SoftMarginLoss, output: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return ``c y^2 p (1 - p)``."""
        (target,) = constant_targets(target)
        check_batch(output, target)
        y = target.to(precise_type(output))
        score = y * output.to(y)
        curvature = y.square() * torch.sigmoid(score) * torch.sigmoid(-score)
        return weighted_entries(loss, curvature, output.numel(), weights)

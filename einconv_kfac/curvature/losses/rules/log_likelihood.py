"""Negative log-likelihood of log-probabilities ``[n, c, *d]``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.class_scores import (
    by_position,
    check_scores,
    drawn,
    target_weights,
)
from einconv_kfac.curvature.losses.loss_rule import LossExample, TorchLossRule


def _labels(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores of three classes, and labels."""
    scores = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return scores, torch.randint(3, (6,), generator=generator)


class LogLikelihoodRule(TorchLossRule):
    """``torch.nn.NLLLoss`` on log-probabilities.

    The loss is linear in the output, so its Hessian vanishes; the Fisher information of a
    term is ``c diag(p)``, which gives the model the same curvature as cross entropy does.
    """

    kinds = (nn.NLLLoss,)
    examples = (
        LossExample(
            partial(nn.NLLLoss, ignore_index=1), _labels, partial(torch.log_softmax, dim=1)
        ),
    )

    def roots(self, loss: nn.NLLLoss, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(c p_v) onehot_v`` for every class and position."""
        check_scores(output)
        scale = (target_weights(loss, output, target).unsqueeze(1) * output.exp()).sqrt()
        for v in range(output.shape[1]):
            root = torch.zeros_like(output)
            root[:, v] = scale[:, v]
            yield from by_position(root)

    def sample(
        self, loss: nn.NLLLoss, output: Tensor, target: Tensor, generator: Generator
    ) -> Tensor:
        """Draw classes from the model: ``-sqrt(c) onehot``."""
        check_scores(output)
        scale = target_weights(loss, output, target).sqrt().unsqueeze(1)
        return -drawn(output.exp(), generator) * scale

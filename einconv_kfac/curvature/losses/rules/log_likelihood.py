"""Negative log-likelihood of log-probabilities ``[n, c, *d]``."""

from __future__ import annotations

from functools import partial

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.class_scores import (
    check_scores,
    drawn,
    filled,
    is_normalized,
    label_weights,
    not_normalized,
)
from einconv_kfac.curvature.losses.diagonal_rule import DiagonalRule
from einconv_kfac.curvature.losses.loss_call import (
    check_not_negative,
    constant_targets,
    precise_type,
    weighted_entries,
)
from einconv_kfac.curvature.losses.loss_rule import Link, LossExample


def _labels(generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw scores of three classes, and labels."""
    scores = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return scores, torch.randint(3, (6,), generator=generator)


class LogLikelihoodRule(DiagonalRule):
    """``torch.nn.NLLLoss`` on log-probabilities.

    The loss is linear in the output, so its Hessian vanishes; the Fisher information of a
    term is ``c diag(p)``, which gives the model the same curvature as cross entropy does.
    Samples are classes drawn from the model.
    """

    kinds = (nn.NLLLoss,)
    examples = (
        LossExample(
            partial(nn.NLLLoss, ignore_index=1), _labels, partial(torch.log_softmax, dim=1)
        ),
    )

    def diagonal(
        self, loss: nn.NLLLoss, output: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return ``c p``."""
        p, terms = _distributions(loss, output, target, weights)
        return terms.unsqueeze(1) * p

    def sample(
        self,
        loss: nn.NLLLoss,
        output: Tensor,
        target: Tensor,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Draw classes from the model: ``-sqrt(c) onehot``."""
        p, terms = _distributions(loss, output, target, weights)
        return (-drawn(p, generator) * terms.sqrt().unsqueeze(1)).to(output.dtype)

    def divisor(self, loss: nn.NLLLoss, output: Tensor, target: Tensor) -> Tensor:
        """See `TorchLossRule`."""
        return label_weights(loss, output, target)[0].sum()

    def canonical(self, loss: nn.NLLLoss, output: Tensor, target: Tensor) -> tuple[Tensor, Link]:
        """See `TorchLossRule`; log-probabilities are scores of themselves."""
        return output, partial(torch.log_softmax, dim=1)


def _distributions(
    loss: nn.NLLLoss, output: Tensor, target: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the probabilities ``p [n, c, *d]`` and the weight ``c`` of each term, ``[n, *d]``."""
    check_scores(output)
    (target,) = constant_targets(target)
    own, _ = label_weights(loss, output, target)
    terms = weighted_entries(loss, own, own.sum(), weights)
    check_not_negative("The class weights of `loss_fn`", terms)
    p = filled(output.to(precise_type(output)).exp(), terms)
    if not is_normalized(p, output):
        raise not_normalized()
    return p, terms

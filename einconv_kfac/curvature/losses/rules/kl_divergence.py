"""Kullback-Leibler divergence of log-probabilities from target distributions."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.losses.class_scores import (
    check_scores,
    filled,
    is_normalized,
    not_normalized,
)
from einconv_kfac.curvature.losses.diagonal_rule import DiagonalRule
from einconv_kfac.curvature.losses.loss_call import (
    check_batch,
    check_not_negative,
    constant_targets,
    precise_type,
    weighted_entries,
)
from einconv_kfac.curvature.losses.loss_rule import Link, LossExample


def _distributions(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw scores ``[4, 3, 2]`` and target distributions over three classes."""
    scores = torch.randn(2, 4, 3, 2, generator=generator, dtype=torch.float64)
    return scores[0], scores[1].softmax(dim=1)


def _log_distributions(generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw scores ``[2, 3, 4]`` with the classes last, and logarithms of target distributions."""
    scores = torch.randn(2, 2, 3, 4, generator=generator, dtype=torch.float64)
    return scores[0], scores[1].log_softmax(dim=-1)


class KullbackLeiblerRule(DiagonalRule):
    """``torch.nn.KLDivLoss`` on log-probabilities.

    The loss is linear in the output, like ``NLLLoss``. The Fisher information of a term with
    target distribution ``q`` is ``c (sum_v q_v) diag(p)``, which gives the model the same
    curvature as cross entropy with soft targets does. The classes are the dimension along which
    the probabilities sum to one.
    """

    kinds = (nn.KLDivLoss,)
    examples = (
        LossExample(nn.KLDivLoss, _distributions, partial(torch.log_softmax, dim=1)),
        LossExample(
            partial(nn.KLDivLoss, log_target=True),
            _log_distributions,
            partial(torch.log_softmax, dim=-1),
        ),
    )

    def diagonal(
        self, loss: nn.KLDivLoss, output: Tensor, target: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Return ``p`` times the weighted sum of the targets of its distribution."""
        (target,) = constant_targets(target)
        q = _targets(loss, output, target)
        is_by_example = loss.reduction == "batchmean"
        count = output.shape[0] if is_by_example else output.numel()
        entries = weighted_entries(loss, q, count, weights)
        check_not_negative("The targets of `loss_fn`", entries)
        dim = _class_dim(output, q, entries)
        terms = entries.sum(dim)
        return filled(output.to(q).exp(), terms, dim) * terms.unsqueeze(dim)

    def canonical(self, loss: nn.KLDivLoss, output: Tensor, target: Tensor) -> tuple[Tensor, Link]:
        """See `TorchLossRule`; log-probabilities are scores of themselves."""
        q = _targets(loss, output, target)
        return output, partial(torch.log_softmax, dim=_class_dim(output, q, q))


def _targets(loss: nn.KLDivLoss, output: Tensor, target: Tensor) -> Tensor:
    """Return the target distributions, ``[n, *f]``, in at least float32."""
    check_scores(output)
    check_batch(output, target)
    target = target.to(precise_type(output))
    return target.exp() if loss.log_target else target


def _class_dim(output: Tensor, q: Tensor, entries: Tensor) -> int:
    """Return the dimension along which probabilities sum to one.

    Where they do so along several, the targets decide, and then the first is taken.

    Args:
        output: The log-probabilities.
        q: The target distributions.
        entries: The weights of the targets; distributions without any may be anything.
    """
    p = output.to(q).exp()
    dims = [d for d in range(1, p.ndim) if is_normalized(filled(p, entries.sum(d), d), output, d)]
    if not dims:
        raise not_normalized()
    if len(dims) > 1:
        dims = [d for d in dims if is_normalized(q, output, d)] or dims
    return dims[0]

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
    filled,
    label_weights,
)
from einconv_kfac.curvature.losses.loss_call import (
    check_not_negative,
    constant_targets,
    precise_type,
    weighted_entries,
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

    def roots(
        self,
        loss: nn.CrossEntropyLoss,
        output: Tensor,
        target: Tensor,
        weights: Tensor | None = None,
    ) -> Iterator[Tensor]:
        """Yield ``sqrt(c p_v) (onehot_v - p)`` for every class and position."""
        p, terms = _distributions(loss, output, target, weights)
        scale = (terms.unsqueeze(1) * p).sqrt()  # n c *d
        classes = torch.arange(output.shape[1], device=output.device)
        for v in range(output.shape[1]):
            onehot = (classes == v).reshape(-1, *[1] * (output.ndim - 2))
            root = (onehot.to(p) - p) * scale[:, v : v + 1]
            yield from by_position(root.to(output.dtype))

    def sample(
        self,
        loss: nn.CrossEntropyLoss,
        output: Tensor,
        target: Tensor,
        generator: Generator,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Draw classes from the model: ``sqrt(c) (p - onehot)``."""
        return next(self._draws(loss, output, target, generator, weights))

    def samples(
        self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor, generator: Generator
    ) -> Iterator[Tensor]:
        """See `TorchLossRule`; the probabilities are computed once."""
        return self._draws(loss, output, target, generator, None)

    def _draws(
        self,
        loss: nn.CrossEntropyLoss,
        output: Tensor,
        target: Tensor,
        generator: Generator,
        weights: Tensor | None,
    ) -> Iterator[Tensor]:
        """Yield samples without end."""
        p, terms = _distributions(loss, output, target, weights)
        scale = terms.sqrt().unsqueeze(1)
        while True:
            yield ((p - drawn(p, generator)) * scale).to(output.dtype)

    def divisor(self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor | int:
        """See `TorchLossRule`."""
        if target.is_floating_point():
            return target.numel()
        return label_weights(loss, output, target)[0].sum()


def _distributions(
    loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor, weights: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the probabilities ``p [n, c, *d]`` and the weight ``c`` of each term, ``[n, *d]``."""
    check_scores(output)
    (target,) = constant_targets(target)
    terms = weighted_entries(loss, *_terms(loss, output, target), weights)
    if weights is not None or loss.weight is not None or target.is_floating_point():
        check_not_negative("The weights of classes and targets of `loss_fn`", terms)
    return filled(output.to(precise_type(output)).softmax(dim=1), terms), terms


def _terms(
    loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor
) -> tuple[Tensor, Tensor | int]:
    """Return the weight of each term before the reduction, ``[n, *d]``, and the mean's divisor.

    Torch's mean is over terms for soft targets, and over class weights for labels.
    """
    smoothing = loss.label_smoothing
    weight = class_weights(loss, output)
    smooth = smoothing * weight.mean()
    if target.is_floating_point():
        terms: Tensor = torch.tensordot(target.to(weight), weight, dims=([1], [0]))
        return (1 - smoothing) * terms + smooth, terms.numel()
    terms, kept = label_weights(loss, output, target)
    return (1 - smoothing) * terms + smooth * kept, terms.sum()

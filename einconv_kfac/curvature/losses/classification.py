"""Losses of class scores ``[n, c, *d]``: one term per example and position ``d``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


class CrossEntropyRule:
    """``torch.nn.CrossEntropyLoss``: the Hessian of a term is ``c (diag(p) - p p^T)``.

    The weight ``c`` of a term holds class weights, label smoothing and soft targets; samples
    are classes drawn from the model.
    """

    def roots(self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(c p_v) (onehot_v - p)`` for every class and position."""
        _check_scores(output)
        p = output.softmax(dim=1)
        scale = (_term_weights(loss, output, target).unsqueeze(1) * p).sqrt()  # n c *d
        classes = torch.arange(output.shape[1], device=output.device)
        for v in range(output.shape[1]):
            onehot = (classes == v).reshape(-1, *[1] * (output.ndim - 2))
            yield from _by_position((onehot.to(p) - p) * scale[:, v : v + 1])

    def sample(
        self, loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor, generator: Generator
    ) -> Tensor:
        """Draw classes from the model: ``sqrt(c) (p - onehot)``."""
        _check_scores(output)
        p = output.softmax(dim=1)
        scale = _term_weights(loss, output, target).sqrt().unsqueeze(1)
        return (p - _drawn(p, generator)) * scale


class LogLikelihoodRule:
    """``torch.nn.NLLLoss`` on log-probabilities.

    The loss is linear in the output, so its Hessian vanishes; the Fisher information of a
    term is ``c diag(p)``, which gives the model the same curvature as cross entropy does.
    """

    def roots(self, loss: nn.NLLLoss, output: Tensor, target: Tensor) -> Iterator[Tensor]:
        """Yield ``sqrt(c p_v) onehot_v`` for every class and position."""
        _check_scores(output)
        scale = (_class_weights(loss, output, target).unsqueeze(1) * output.exp()).sqrt()
        for v in range(output.shape[1]):
            root = torch.zeros_like(output)
            root[:, v] = scale[:, v]
            yield from _by_position(root)

    def sample(
        self, loss: nn.NLLLoss, output: Tensor, target: Tensor, generator: Generator
    ) -> Tensor:
        """Draw classes from the model: ``-sqrt(c) onehot``."""
        _check_scores(output)
        scale = _class_weights(loss, output, target).sqrt().unsqueeze(1)
        return -_drawn(output.exp(), generator) * scale


def _check_scores(output: Tensor) -> None:
    """Check that the output is a batch of class scores."""
    if output.ndim < 2 or output.numel() == 0:
        raise ValueError(
            f"The model's output must be a non-empty batch [n, c, *d], got {tuple(output.shape)}."
        )


def _by_position(root: Tensor) -> Iterator[Tensor]:
    """Yield a root vector ``[n, c, *d]`` position by position."""
    if root[0, 0].numel() == 1:
        yield root
        return
    flat = root.flatten(2)
    for position in range(flat.shape[2]):
        part = torch.zeros_like(flat)
        part[..., position] = flat[..., position]
        yield part.reshape(root.shape)


def _drawn(p: Tensor, generator: Generator) -> Tensor:
    """Return classes drawn from ``p [n, c, *d]``, one-hot."""
    rows = p.movedim(1, -1)
    draws = torch.multinomial(rows.flatten(end_dim=-2), 1, generator=generator)
    onehot = functional.one_hot(draws[:, 0], p.shape[1]).to(p)
    return onehot.reshape(rows.shape).movedim(-1, 1)


def _class_weights(
    loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor
) -> Tensor:
    """Return the class weight of each term over the reduction's divisor, ``[n, *d]``."""
    weight = _weight(loss, output)
    kept = target != loss.ignore_index
    terms = weight[target.where(kept, 0)] * kept
    return terms / terms.sum() if loss.reduction == "mean" else terms


def _term_weights(loss: nn.CrossEntropyLoss, output: Tensor, target: Tensor) -> Tensor:
    """Return the weight ``c`` of each term, ``[n, *d]``, as torch defines it."""
    weight, smoothing = _weight(loss, output), loss.label_smoothing
    smooth = smoothing * weight.mean()
    if target.is_floating_point():
        terms: Tensor = torch.tensordot(target.to(weight), weight, dims=([1], [0]))
        terms = (1 - smoothing) * terms + smooth
        return terms / terms.numel() if loss.reduction == "mean" else terms
    kept = target != loss.ignore_index
    terms = weight[target.where(kept, 0)] * kept
    total = terms.sum() if loss.reduction == "mean" else 1
    return ((1 - smoothing) * terms + smooth * kept) / total


def _weight(loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor) -> Tensor:
    """Return the weights of the classes."""
    return output.new_ones(output.shape[1]) if loss.weight is None else loss.weight.to(output)

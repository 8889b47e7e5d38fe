"""Class scores ``[n, c, *d]`` with one term of the loss per example and position ``d``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional


def check_scores(output: Tensor) -> None:
    """Check that the output is a batch of class scores."""
    if output.ndim < 2 or output.numel() == 0:
        raise ValueError(
            f"The model's output must be a non-empty batch [n, c, *d], got {tuple(output.shape)}."
        )


def by_position(root: Tensor) -> Iterator[Tensor]:
    """Yield a root vector ``[n, c, *d]`` position by position, the other entries zero."""
    if root[0, 0].numel() == 1:
        yield root
        return
    flat = root.flatten(2)
    for position in range(flat.shape[2]):
        part = torch.zeros_like(flat)
        part[..., position] = flat[..., position]
        yield part.reshape(root.shape)


def drawn(p: Tensor, generator: Generator) -> Tensor:
    """Return classes drawn from ``p [n, c, *d]``, one-hot."""
    rows = p.movedim(1, -1)
    draws = torch.multinomial(rows.flatten(end_dim=-2), 1, generator=generator)
    onehot = functional.one_hot(draws[:, 0], p.shape[1]).to(p)
    return onehot.reshape(rows.shape).movedim(-1, 1)


def target_weights(
    loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor
) -> Tensor:
    """Return the class weight of each term over the reduction's divisor, ``[n, *d]``."""
    weight = class_weights(loss, output)
    kept = target != loss.ignore_index
    terms = weight[target.where(kept, 0)] * kept
    return terms / terms.sum() if loss.reduction == "mean" else terms


def class_weights(loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor) -> Tensor:
    """Return the weight of each class, ``[c]``."""
    return output.new_ones(output.shape[1]) if loss.weight is None else loss.weight.to(output)

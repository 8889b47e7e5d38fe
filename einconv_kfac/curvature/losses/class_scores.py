"""Class scores ``[n, c, *d]`` with one term of the loss per example and position ``d``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature.losses.loss_call import precise_type

_NORMALIZATION = 0.1, 0.3
"""How far probabilities may be from a sum of one: in float32 and above, and below."""


def check_scores(output: Tensor) -> None:
    """Check that the output is a batch of class scores."""
    if output.ndim < 2 or output.shape[1] == 0:
        raise ValueError(
            f"The model's output must be a non-empty batch [n, c, *d], got {tuple(output.shape)}. "
            "Add a batch dimension with `x.unsqueeze(0)`."
        )


def by_position(root: Tensor) -> Iterator[Tensor]:
    """Yield a root vector ``[n, c, *d]`` position by position, the other entries zero."""
    if root.shape[2:].numel() == 1:
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
    draws = random_classes(rows.reshape(-1, p.shape[1]), generator)
    onehot = torch.zeros_like(rows).scatter_(-1, draws.reshape(*rows.shape[:-1], 1), 1)
    return onehot.movedim(-1, 1)


def random_classes(p: Tensor, generator: Generator) -> Tensor:
    """Return a class drawn from each row of ``p [n, c]``, ``[n]``.

    The class with the smallest ``e / p`` is drawn, for ``e`` from the exponential distribution:
    ``e / p`` has the rate ``p``, and is the smallest with probability ``p``. It is what
    ``torch.multinomial`` draws, without its check of the values, for which the host would wait
    and which ends the use of a GPU where one is not finite. For such values the class is any.
    """
    if p.numel() == 0:
        return torch.zeros(len(p), dtype=torch.long, device=p.device)
    waiting = torch.empty_like(p, memory_format=torch.contiguous_format)
    waiting.exponential_(generator=generator).clamp_(min=torch.finfo(p.dtype).tiny)
    return (p / waiting).argmax(-1)


def filled(p: Tensor, weights: Tensor, dim: int = 1) -> Tensor:
    """Return probabilities ``[n, c, *d]`` that are uniform where a term has no weight.

    The scores of an ignored term may be anything, infinities included.
    """
    return p.masked_fill((weights == 0).unsqueeze(dim), 1 / p.shape[dim])


def is_normalized(p: Tensor, output: Tensor, dim: int = 1) -> bool:
    """Return whether ``p``, computed from ``output``, sums to one along a dimension."""
    is_low = output.dtype != precise_type(output)
    error = (p.sum(dim) - 1).abs()
    return not bool((error > _NORMALIZATION[is_low]).any())  # NaN shows in the loss


def not_normalized() -> ValueError:
    """Return the error for an output whose exponentials are no probabilities."""
    return ValueError(
        "The model's output must be log-probabilities, as from `log_softmax` along the classes, "
        "got exponentials that do not sum to 1. Apply `log_softmax`; fisher='empirical' takes "
        "any output."
    )


def label_weights(
    loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the class weight of each label, and whether it counts; ``[n, *d]``.

    The weight of an ignored label is zero. The sum of the weights is what a mean divides by.
    """
    labels = target.long()
    kept = labels != loss.ignore_index
    return class_weights(loss, output)[labels.where(kept, 0)] * kept, kept


def class_weights(loss: nn.CrossEntropyLoss | nn.NLLLoss, output: Tensor) -> Tensor:
    """Return the weight of each class, ``[c]``, in at least float32."""
    precise, weight = precise_type(output), loss.weight
    if weight is None:
        return output.new_ones(output.shape[min(1, output.ndim - 1)], dtype=precise)
    return weight.detach().to(output.device, precise)

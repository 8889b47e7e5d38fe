"""Gradients of losses over alignments by log-probabilities, with what a softmax before them hides.

torch returns ``p - q`` for the probabilities ``p`` of classes and the expectations ``q`` of aligned
labels, as if by the scores before the logarithm of a softmax (Graves et al., 2006). By
the log-probabilities it is ``-q``, from which that function's derivative makes the same. ``q``
sums to one at each position: the weight of a cross entropy, whose curvature the loss then has.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_REARRANGED = ("Transpose", "Permute", "View", "UnsafeView", "Unsqueeze", "Squeeze", "Clone", "T")
"""Operations by which a model may give its log-probabilities another shape."""


def alignment_gradients(
    kind: str, node: Any, gradient: Tensor | None
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients at the inputs of a loss over alignments, or ``None`` for other nodes.

    Args:
        kind: The operation.
        node: Its node.
        gradient: The gradient at the losses of the sequences, ``[n]``.
    """
    if gradient is None or not is_alignment(kind, node):
        return None
    found = node(gradient)
    by_scores, *others = found if isinstance(found, tuple) else (found,)
    log_p = node._saved_log_probs.detach()  # [t, n, c]
    lengths = torch.as_tensor(node._saved_input_lengths, device=log_p.device)
    counts = torch.arange(len(log_p), device=log_p.device)[:, None] < lengths
    counts = counts & (by_scores.detach() != 0).any(-1)  # not of losses that are infinite
    return by_scores - log_p.exp() * (counts * gradient).unsqueeze(-1), *others


def is_alignment(kind: str, node: Any) -> bool:
    """Return whether a node of a kind is a loss over alignments of log-probabilities."""
    return kind == "CtcLoss" and log_softmax_before(node.next_functions[0][0]) is not None


def log_softmax_before(node: Any) -> Any:
    """Return the logarithm of a softmax that a node rearranges, or is; ``None`` for others."""
    while node is not None:
        kind = node.name().rpartition("::")[2].rpartition("Backward")[0]
        if kind == "LogSoftmax":
            return node
        node = node.next_functions[0][0] if kind in _REARRANGED else None
    return None

"""Gradients of the weight of one-hot inputs, example by example, without one-hot vectors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSums:
    """Sums over the positions of an example that have the same token.

    They are the columns of the example's gradient ``[co, d]`` that are not zero.

    Args:
        tokens: The token of each pair of an example and a token that occurs in it, ``[p]``.
        pairs: For each example and position, the number of its pair, ``[(n s)]``.
    """

    tokens: Tensor
    pairs: Tensor

    @staticmethod
    def of(indices: Tensor, size: int) -> TokenSums:
        """Return the pairs of tokens ``[n, s]``, where ``size`` stands for no token."""
        examples = torch.arange(len(indices), device=indices.device).unsqueeze(1)
        keys, pairs = torch.unique(examples * (size + 1) + indices, return_inverse=True)
        return TokenSums(keys % (size + 1), pairs.flatten())

    def add_squares_(
        self, total: Tensor, g: Tensor, scale: float, *, is_alone: bool = False
    ) -> None:
        """Add the squared entries of the gradients of all examples.

        Args:
            total: The sum, ``[1, co, d]``.
            g: Gradients at the outputs, ``[n, 1, co, s]``.
            scale: Factor of the squares.
            is_alone: Whether the gradients of all examples are one.
        """
        rows = g.squeeze(1).mT.flatten(0, 1)  # (n s) co
        sums = rows.new_zeros(len(self.tokens), rows.shape[1]).index_add_(0, self.pairs, rows)
        known = self.tokens < total.shape[2]
        if is_alone:
            whole = torch.zeros_like(total[0])
            whole.index_add_(1, self.tokens[known], sums[known].mT)
            total.addcmul_(whole, whole, value=scale)
            return
        squares = sums[known].square_().mT.unsqueeze(0)
        total.index_add_(2, self.tokens[known], squares, alpha=scale)

"""``torch.nn.Embedding``: a linear layer of one-hot inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.factors.approximation import Approximation, second_moment, updated
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule


class EmbeddingRule(LayerRule):
    """Inputs are indices ``[n, *s]``, outputs ``[n, *s, co]``.

    With ``"expand"`` the factor ``A`` is diagonal: how often each index occurs per example. The
    row of the weight at ``padding_idx`` is not trained, so its input counts as zero.
    """

    kinds = (nn.Embedding,)
    examples = (
        LayerExample(lambda: nn.Embedding(5, 3), (4,), classes=5),
        LayerExample(lambda: nn.Embedding(5, 3, padding_idx=1), (3, 2, 2), classes=5),
    )
    row_dim = 1
    one_hot = True

    def split(self, module: nn.Embedding) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (1, *module.weight.shape), (0, 2, 1)

    def refusal(self, module: nn.Embedding) -> str | None:
        """See `LayerRule`."""
        return (
            None if module.max_norm is None else "max_norm changes the weight in the forward pass"
        )

    def accepts(self, module: nn.Embedding, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim >= 1

    def indices(self, module: nn.Embedding, x: Tensor) -> Tensor:
        """See `LayerRule`."""
        rows = x.reshape(x.shape[0], -1).long()
        if module.padding_idx is None:
            return rows
        return rows.masked_fill(rows == module.padding_idx, module.num_embeddings)

    def inputs(self, module: nn.Embedding, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        size = module.num_embeddings
        onehot = functional.one_hot(self.indices(module, x), size + 1)[..., :size]
        return onehot.to(module.weight.dtype).mT.unsqueeze(1)

    def input_sums(self, module: nn.Embedding, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`; the counts of the indices."""
        rows, size = self.indices(module, x), module.num_embeddings
        counts = torch.zeros(len(rows), size + 1, dtype=torch.long, device=x.device)
        counts.scatter_add_(1, rows, torch.ones_like(rows))
        return counts[:, None, :size, None].to(_dtype(module))

    def input_factor(
        self,
        module: nn.Embedding,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        if approximation == "expand" or bias:
            return super().input_factor(module, x, y_shape, approximation, bias, **into)
        mean = self.input_sums(module, x, y_shape) / self.positions(module, y_shape)
        return second_moment(mean, len(x), **into)

    def input_diagonal(
        self,
        module: nn.Embedding,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`; no one-hot vector exists."""
        if bias:
            return super().input_diagonal(module, x, y_shape, approximation, bias, **into)
        rows, size = self.indices(module, x), module.num_embeddings
        if approximation == "expand":
            found, squares = rows.flatten(), torch.ones_like(rows).flatten()
        else:  # the squared frequency of each index of each example
            examples = torch.arange(len(rows), device=rows.device).unsqueeze(1)
            pairs, counts = torch.unique(examples * (size + 1) + rows, return_counts=True)
            found, squares = pairs % (size + 1), counts.square()
        total = torch.zeros(size + 1, dtype=torch.long, device=x.device)
        total.index_add_(0, found, squares)
        divisor = 1 if approximation == "expand" else self.positions(module, y_shape) ** 2
        return updated(total[None, :size].to(_dtype(module)) / (len(x) * divisor), **into)

    def outputs(self, module: nn.Embedding, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]).mT.unsqueeze(1)


def _dtype(module: nn.Embedding) -> torch.dtype:
    """Return the dtype of sums."""
    return torch.promote_types(module.weight.dtype, torch.float32)

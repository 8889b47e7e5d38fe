"""``torch.nn.Embedding``: a linear layer of one-hot inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule

LARGEST_VOCABULARY = 8192
"""Number of embeddings above which the dense factor of the inputs is refused."""


class EmbeddingRule(LayerRule):
    """Inputs are indices ``[n, *s]``, outputs ``[n, *s, co]``."""

    kinds = (nn.Embedding,)
    examples = (
        LayerExample(lambda: nn.Embedding(5, 3), (4,), classes=5),
        LayerExample(lambda: nn.Embedding(5, 3, padding_idx=1), (3, 2, 2), classes=5),
    )
    has_free_positions = True
    preconditioned = False  # the inverse of a factor of the vocabulary's size costs too much

    def split(self, module: nn.Embedding) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (1, *module.weight.shape), (0, 2, 1)

    def refusal(self, module: nn.Embedding) -> str | None:
        """See `LayerRule`."""
        if module.num_embeddings > LARGEST_VOCABULARY:
            return f"more than {LARGEST_VOCABULARY} embeddings need too large a factor"
        return (
            None if module.max_norm is None else "max_norm changes the weight in the forward pass"
        )

    def accepts(self, module: nn.Embedding, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim >= 1

    def inputs(self, module: nn.Embedding, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        rows = x.reshape(x.shape[0], -1)
        onehot = functional.one_hot(rows, module.num_embeddings).to(module.weight.dtype)
        if module.padding_idx is not None:
            onehot[..., module.padding_idx] = 0  # torch does not train this row of the weight
        return onehot.mT.unsqueeze(1)

    def outputs(self, module: nn.Embedding, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient.reshape(gradient.shape[0], -1, gradient.shape[-1]).mT.unsqueeze(1)

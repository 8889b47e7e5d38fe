"""Networks of sequences: rows, characters and patches."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

SYMBOLS = 128
"""Characters of ASCII."""


class RowsLSTM(nn.Module):
    """An LSTM over the rows of an image, and a linear layer on its last output."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(size, width, batch_first=True), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[n, 10]`` of images ``[n, 1, size, size]``."""
        scores: Tensor = self.head(self.lstm(x.squeeze(1))[0][:, -1])
        return scores


class TransformerBlock(nn.Module):
    """Attention and two linear layers, each behind a layer norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.path = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``[n, t, width]`` for ``[n, t, width]``."""
        x = x + self.projection(self._attention(self.first(x)))
        out: Tensor = x + self.path(self.second(x))
        return out

    def _attention(self, x: Tensor) -> Tensor:
        """Return the attended values of all heads, side by side."""
        parts = self.queries_keys_values(x).unflatten(2, (3, self.heads, -1))
        q, k, v = parts.permute(2, 0, 3, 1, 4)  # each [n, heads, t, width / heads]
        attended = scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return attended.transpose(1, 2).flatten(2)


class CharacterTransformer(nn.Module):
    """Scores of the next character of ASCII, by attention to those before it."""

    def __init__(self, length: int, width: int, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.characters = nn.Embedding(SYMBOLS, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, True) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, SYMBOLS))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[n, t, SYMBOLS]`` for characters ``[n, t]``."""
        scores: Tensor = self.head(self.blocks(self.characters(x) + self.positions[: x.shape[1]]))
        return scores


class VisionTransformer(nn.Module):
    """Scores of classes, by attention between the patches of an image; their mean is taken."""

    def __init__(self, size: int, patch: int, width: int, depth: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads, False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores ``[n, 10]`` of images ``[n, 1, size, size]``."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        scores: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return scores

"""Inputs with their targets."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """Inputs ``[n, ...]`` with their targets ``[n, ...]``."""

    x: Tensor
    y: Tensor

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(self.x)

    def first(self, count: int) -> Examples:
        """Return the first examples."""
        return Examples(self.x[:count], self.y[:count])


@dataclass(frozen=True)
class Split:
    """Examples to train on and examples to test on."""

    train: Examples
    test: Examples

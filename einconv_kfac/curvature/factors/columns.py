"""The columns ``a[n, s]`` of a layer, ``[n, g, d, s]``, which need not exist in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.factors.algorithms.pointwise import add_columns_
from einconv_kfac.curvature.factors.reduce import position_sums
from einconv_kfac.curvature.factors.symmetric.update import Update


class Columns(ABC):
    """The columns of a layer, as the sums that factors are made of.

    Args:
        like: A tensor of the columns' dtype and device.
        shape: The numbers ``(n, g, d, s)``: examples, groups, rows per group, positions.
    """

    def __init__(self, like: Tensor, shape: tuple[int, int, int, int]) -> None:
        self.like = like
        self.examples, self.groups, self.size, self.positions = shape

    @abstractmethod
    def add_(self, update: Update) -> None:
        """Add ``sum_{n,s} a a^T`` to an update of ``[g, d, d]``."""

    @abstractmethod
    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """Return the sums over positions, ``[n, (g d)]``."""

    def existing(self) -> Tensor | None:
        """Return the columns ``[n, d, s]`` of a single group, if they are parts of the input."""
        return None

    def total(self, dtype: torch.dtype) -> Tensor:
        """Return the sums over examples and positions, ``[(g d)]``."""
        return self.position_sums(dtype).sum(0)


class ChannelColumns(Columns):
    """Columns that are the channels of ``x``, of shape ``[n, (g d), *s]``."""

    def __init__(self, x: Tensor, groups: int) -> None:
        n, channels = x.shape[:2]
        super().__init__(x, (n, groups, channels // groups, prod(x.shape[2:])))

    def add_(self, update: Update) -> None:
        """See `Columns`."""
        add_columns_(self.like.reshape(self.examples, self.groups, self.size, -1), update)

    def existing(self) -> Tensor | None:
        """See `Columns`."""
        return self.like.flatten(2) if self.groups == 1 else None

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return position_sums(self.like, dtype)


class FeatureColumns(Columns):
    """Columns that are the features of ``rows``, of shape ``[n, s, d]``, in one group."""

    def __init__(self, rows: Tensor) -> None:
        n, positions, size = rows.shape
        super().__init__(rows, (n, 1, size, positions))

    def add_(self, update: Update) -> None:
        """See `Columns`."""
        add_columns_(self.like.mT.unsqueeze(1), update)

    def existing(self) -> Tensor | None:
        """See `Columns`."""
        return self.like.mT

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return position_sums(self.like.mT, dtype)

    def total(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`; one sum over all rows is up to four times faster than two."""
        if self.like.dtype != dtype:  # converted a few examples at a time
            return super().total(dtype)
        return self.like.sum((0, 1))

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

    def total(self, dtype: torch.dtype) -> Tensor:
        """Return the sums over examples and positions, ``[(g d)]``."""
        return self.position_sums(dtype).sum(0)


class ChannelColumns(Columns):
    """Columns that are the channels of ``x``, of shape ``[n, g, d, *s]``."""

    def __init__(self, x: Tensor) -> None:
        n, groups, size = x.shape[:3]
        super().__init__(x, (n, groups, size, prod(x.shape[3:])))
        self._x = x

    def add_(self, update: Update) -> None:
        """See `Columns`."""
        x = self._x if self._x.ndim == 4 else self._x.reshape(*self._x.shape[:3], -1)
        add_columns_(x, update)

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return position_sums(self._x.flatten(1, 2), dtype)


class FeatureColumns(ChannelColumns):
    """Columns that are the features of ``rows``, of shape ``[n, s, d]``, in one group."""

    def __init__(self, rows: Tensor) -> None:
        super().__init__(rows.mT.unsqueeze(1))
        self._rows = rows

    def total(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`; one sum over all rows, which takes a quarter of the time of two."""
        if self._rows.dtype != dtype:  # converted a few examples at a time
            return super().total(dtype)
        return self._rows.sum((0, 1))

"""The columns of the unfolded input of a convolution, which is never unfolded as a whole."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import rounds_to_tf32
from einconv_kfac.curvature.devices.threads import threads_for
from einconv_kfac.curvature.factors.choice import algorithm_of
from einconv_kfac.curvature.factors.columns import Columns
from einconv_kfac.curvature.factors.division import add_divided
from einconv_kfac.curvature.factors.indices.runs import finest_partition
from einconv_kfac.curvature.factors.problem import problem_of
from einconv_kfac.curvature.factors.reduce import window_sums, with_zeros
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Geometry


class ConvColumns(Columns):
    """The columns of the unfolded input ``x`` of a convolution, ``[n, c, *i]``.

    Args:
        x: The input.
        geometry: The convolution.
        algorithm: Name of the algorithm for the sum of outer products; by default the cheapest.
    """

    def __init__(self, x: Tensor, geometry: Geometry, algorithm: str | None) -> None:
        channels = geometry.split_channels(x.shape[1])
        self._problem = problem_of(
            geometry,
            x.shape[0],
            channels,
            x.dtype,
            x.device.type,
            rounds_to_tf32(x),
            threads_for(x),
        )
        shape = (x.shape[0], geometry.groups, self._problem.size, self._problem.positions)
        super().__init__(x, shape)
        self._algorithm = algorithm

    def add_(self, update: Update) -> None:
        """See `Columns`."""
        algorithm = algorithm_of(self._problem, self._algorithm)
        x = self.like
        if algorithm.reads_unmet:
            axes = self._problem.geometry.axes
            x = with_zeros(x, tuple(finest_partition(axis, False).entries for axis in axes))
        add_divided(algorithm, x, self._problem, update)

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return window_sums(self.like, self._problem.geometry, dtype)

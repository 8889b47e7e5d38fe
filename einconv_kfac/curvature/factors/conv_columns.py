"""The columns of the unfolded input of a convolution, which is never unfolded as a whole."""

from __future__ import annotations

from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import rounds_to_tf32
from einconv_kfac.curvature.devices.threads import threads_for
from einconv_kfac.curvature.factors.algorithms.pointwise import met_inputs
from einconv_kfac.curvature.factors.choice import algorithm_of
from einconv_kfac.curvature.factors.columns import Columns
from einconv_kfac.curvature.factors.division import add_divided
from einconv_kfac.curvature.factors.indices.runs import finest_partition
from einconv_kfac.curvature.factors.problem import Problem, problem_of
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
        self._channels, groups = geometry.split_channels(x.shape[1]), geometry.groups
        self._geometry, self._algorithm = geometry, algorithm
        size = self._channels * prod(geometry.kernel_size)
        super().__init__(x, (x.shape[0], groups, size, geometry.positions))

    def add_(self, update: Update) -> None:
        """See `Columns`."""
        x, problem = self.like, self._problem()
        algorithm = algorithm_of(problem, self._algorithm)
        if algorithm.reads_unmet:
            axes = self._geometry.axes
            x = with_zeros(x, tuple(finest_partition(axis, False).entries for axis in axes))
        add_divided(algorithm, x, problem, update)

    def existing(self) -> Tensor | None:
        """See `Columns`; they are those of a kernel of one entry that meets no padding."""
        if self._algorithm is not None or self.groups > 1 or not _is_pixelwise(self._geometry):
            return None
        met = met_inputs(self.like, self._geometry)
        if met is self.like:
            return met.flatten(2)
        return met.transpose(0, 1).flatten(2).transpose(0, 1)  # copied once, all in a row

    def _problem(self) -> Problem:
        """Return the problem that decides how the sum of outer products is computed."""
        x = self.like
        kind, threads = (x.dtype, x.device.type, rounds_to_tf32(x)), threads_for(x)
        return problem_of(self._geometry, x.shape[0], self._channels, *kind, threads)

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return window_sums(self.like, self._geometry, dtype)


@lru_cache(maxsize=4096)
def _is_pixelwise(geometry: Geometry) -> bool:
    """Return whether the kernel has one entry, which meets no padding."""
    entries = all(axis.kernel_size == 1 for axis in geometry.axes)
    return entries and all(len(axis.outputs(0)) == axis.output_size for axis in geometry.axes)

"""The columns of the unfolded input of a convolution, which is never unfolded as a whole."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import rounds_to_tf32
from einconv_kfac.curvature.devices.threads import threads_for
from einconv_kfac.curvature.factors.algorithms.pointwise import met_entries
from einconv_kfac.curvature.factors.choice import algorithm_of
from einconv_kfac.curvature.factors.columns import Columns
from einconv_kfac.curvature.factors.division import add_divided
from einconv_kfac.curvature.factors.indices.runs import finest_partition
from einconv_kfac.curvature.factors.problem import Problem, problem_of
from einconv_kfac.curvature.factors.reduce import window_sums, with_zeros
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Geometry


class _Plan(NamedTuple):
    """What a geometry and a number of channels say of the columns.

    Attributes:
        channels: Channels per group.
        size: Rows per group.
        positions: Output positions.
        are_inputs: Whether the columns are entries of the input, since no padding is met.
        met: Index of these entries; ``None`` for all of them.
    """

    channels: int
    size: int
    positions: int
    are_inputs: bool
    met: tuple[Any, ...] | None


class ConvColumns(Columns):
    """The columns of the unfolded input ``x`` of a convolution, ``[n, c, *i]``.

    Args:
        x: The input.
        geometry: The convolution.
        algorithm: Name of the algorithm for the sum of outer products; by default the cheapest.
    """

    def __init__(self, x: Tensor, geometry: Geometry, algorithm: str | None) -> None:
        examples, channels = x.shape[:2]
        self._geometry, self._algorithm = geometry, algorithm
        self._plan = _plan_of(geometry, channels)
        super().__init__(x, (examples, geometry.groups, self._plan.size, self._plan.positions))

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
        if self._algorithm is not None or self.groups > 1 or not self._plan.are_inputs:
            return None
        x, met = self.like, self._plan.met
        if met is None:
            return x.flatten(2)
        return x[met].transpose(0, 1).flatten(2).transpose(0, 1)  # copied once, all in a row

    def _problem(self) -> Problem:
        """Return the problem that decides how the sum of outer products is computed."""
        x = self.like
        kind, threads = (x.dtype, x.device.type, rounds_to_tf32(x)), threads_for(x)
        return problem_of(self._geometry, x.shape[0], self._plan.channels, *kind, threads)

    def position_sums(self, dtype: torch.dtype) -> Tensor:
        """See `Columns`."""
        return window_sums(self.like, self._geometry, dtype)


@lru_cache(maxsize=4096)
def _plan_of(geometry: Geometry, channels: int) -> _Plan:
    """Return what is known of the columns of an input of so many channels."""
    own, axes = geometry.split_channels(channels), geometry.axes
    is_one_entry = all(axis.kernel_size == 1 for axis in axes)
    are_inputs = is_one_entry and all(len(axis.outputs(0)) == axis.output_size for axis in axes)
    met = met_entries(geometry) if are_inputs else None
    return _Plan(own, own * prod(geometry.kernel_size), geometry.positions, are_inputs, met)

"""The product of the unfolded input with its transpose by a kernel in Triton that never unfolds.

The input is read where it is, and only the upper triangle is multiplied. No GPU has measured the
kernel: it is computed where it is asked for by name, and not chosen.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.products import LOW_PRECISION, rounds_to_tf32
from einconv_kfac.curvature.devices.profile import DeviceProfile
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm, Cost
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.update import Update
from einconv_kfac.geometry import Axis, Geometry

MOST_AXES = 3
MOST_ELEMENTS = 1 << 31
"""Elements of an input or a factor from which their places have no number of 32 bits."""

PROGRAMS = 528
"""Programs that occupy an H100, four for each of its multiprocessors."""

SITES = 32
"""Positions that a program multiplies at a time."""

LEAST_PART_SITES = 8 * SITES
"""Positions of a part for which a program is worth its start."""


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    """Return whether Triton is installed."""
    return find_spec("triton") is not None


def runs_on(profile: DeviceProfile) -> bool:
    """Return whether the kernel runs on a device, which in Triton's interpreter is any."""
    interprets = os.environ.get("TRITON_INTERPRET") == "1"
    return (profile.runs_triton or interprets) and _has_triton()


def tile_rows(size: int) -> int:
    """Return the rows of a tile of a factor with ``size`` rows."""
    return next(rows for rows in (16, 32, 64) if rows >= min(size, 64))


@dataclass(frozen=True)
class Plan:
    """How the work is divided.

    Args:
        groups: Number of channel groups.
        rows: Rows and columns of a tile.
        tiles: Tiles of the upper block triangle.
        sites: Output positions of all examples.
        parts: Parts into which the sites are divided, so that programs occupy a device.
    """

    groups: int
    rows: int
    tiles: int
    sites: int
    parts: int

    @staticmethod
    def of(problem: Problem) -> Plan:
        """Return the plan for a problem."""
        rows, groups = tile_rows(problem.size), problem.geometry.groups
        side = -(-problem.size // rows)
        tiles = side * (side + 1) // 2
        sites = problem.batch * problem.geometry.positions
        wanted = -(-PROGRAMS // (tiles * groups))
        most = max(1, min(wanted, sites // LEAST_PART_SITES))
        per_part = -(-sites // (most * SITES)) * SITES
        return Plan(groups, rows, tiles, sites, -(-sites // per_part))

    @property
    def sites_per_part(self) -> int:
        """Sites of a part, a multiple of those that are multiplied at a time."""
        return -(-self.sites // (self.parts * SITES)) * SITES

    @property
    def sums(self) -> tuple[int, ...]:
        """Shape of the sums of all programs."""
        return self.parts, self.groups, self.tiles, self.rows, self.rows


class Fused(Algorithm):
    """The product with an input that is unfolded in the registers of a GPU alone."""

    name = "fused"
    rank = 7
    is_measured = False

    def applies(self, problem: Problem) -> bool:
        """Return whether there is Triton, on a GPU, and the problem is one of its kernel's."""
        few = problem.geometry.ndim <= MOST_AXES
        small = max(problem.inputs, problem.outputs, problem.size**2) < MOST_ELEMENTS
        return few and small and problem.dtype != torch.float64 and runs_on(problem.profile)

    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""
        plan = Plan.of(problem)
        macs = float(plan.tiles * plan.rows**2 * plan.sites * plan.groups)
        written = 2.0 * prod(plan.sums)
        return Cost(macs, 1.0, 0.0, written, 4, is_mixed=True)

    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to the update, in two launches."""
        kernels: Any = import_module("einconv_kfac.curvature.factors.fused_kernels")
        plan, out = Plan.of(problem), update.out
        missing = MOST_AXES - problem.geometry.ndim
        x = x.reshape(*x.shape[:2], *[1] * missing, *x.shape[2:])
        sums = x.new_empty(plan.sums, dtype=torch.float32)
        precision = "tf32" if x.dtype not in LOW_PRECISION and rounds_to_tf32(x) else "ieee"
        sizes = plan.sites, plan.sites_per_part, problem.channels
        constants = plan.rows, SITES, precision
        with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
            kernels.partial_products[plan.tiles, plan.parts, plan.groups](
                x, sums, *sizes, *_geometry_arguments(problem.geometry, x), *constants
            )
            kernels.add_parts[plan.tiles, plan.groups](
                sums,
                out,
                *(problem.size, plan.parts, *out.stride(), update.beta, update.alpha),
                *(plan.rows, update.beta != 0),
            )


def _geometry_arguments(geometry: Geometry, x: Tensor) -> list[int]:
    """Return the kernel's arguments that describe a convolution of ``x [n, c, i0, i1, i2]``."""
    axes = [Axis(1, 1)] * (MOST_AXES - geometry.ndim) + [*geometry.axes]
    return [
        *(axis.input_size for axis in axes),
        *(axis.output_size for axis in axes[1:]),
        geometry.positions,
        *x.stride(),
        *(axis.kernel_size for axis in axes),
        *(axis.stride for axis in axes),
        *(axis.padding[0] for axis in axes),
        *(axis.dilation for axis in axes),
    ]

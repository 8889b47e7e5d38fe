"""What no exact method can avoid for a factor, and where the time of ours goes.

The multiply-accumulates that remain when every product of positions is computed once, at the rate
of a large matrix product of the same run; and the input read once and the result written once, at
the rates of a sum and a fill of arrays larger than the caches.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import product
from math import prod

import torch
from factor_contestants import ours
from factor_layers import Layer
from timing import seconds
from torch.profiler import ProfilerActivity, profile

from einconv_kfac.curvature.devices.products import add_matmul_
from einconv_kfac.curvature.factors.indices.lag_pairs import half_of_lags
from einconv_kfac.curvature.factors.indices.residue_classes import residue_classes
from einconv_kfac.geometry import Axis

SORTS = {
    "products": (
        *("aten::mm", "aten::addmm_", "aten::bmm", "aten::baddbmm_", "mkldnn::_linear_pointwise"),
        *("aten::convolution_backward", "aten::_slow_conv2d_backward"),
    ),
    "copies": ("aten::copy_", "aten::fill_", "aten::cat"),
    "sums": ("aten::sum", "aten::add", "aten::add_", "aten::mul", "aten::mul_", "aten::div_"),
}


@dataclass(frozen=True)
class Rates:
    """Multiply-accumulates, bytes read and bytes written per second."""

    macs: float
    read: float
    write: float

    def __str__(self) -> str:
        macs, read, write = (rate / 1e9 for rate in (self.macs, self.read, self.write))
        return f"product {macs:.1f} GMAC/s, read {read:.1f}, write {write:.1f} GB/s"

    def bounds(self, layer: Layer, approximation: str) -> tuple[float, float]:
        """Return the seconds of the products, and of the bytes, that cannot be avoided."""
        inputs = prod(layer.shape) / self.read
        moved = 4 * (inputs + layer.result_size / self.write)
        return least(layer, approximation) / self.macs, moved


def _products(axes: tuple[Axis, ...]) -> float:
    """Count the pairs of positions whose product some entry needs, mirror images once."""
    keys = half_of_lags(axes)
    counts = [prod(sum(stop - start for start, stop in g.regions) for g in key) for key in keys]
    zero = sum(n for n, key in zip(counts, keys) if not any(g.distance for g in key))
    return sum(counts) - zero / 2


def least(layer: Layer, approximation: str) -> float:
    """Return the multiply-accumulates that no exact method can avoid."""
    problem = layer.problem
    if approximation == "reduce":
        return problem.batch * layer.result_size / 2
    axes = layer.geometry.axes
    found = [axes]
    if layer.transposed:
        found = [tuple(c.axis for c in classes) for classes in product(*map(residue_classes, axes))]
    pairs = sum(map(_products, found)) * problem.batch * layer.groups
    return pairs * problem.channels**2


def shares(layer: Layer, approximation: str, repeats: int) -> dict[str, float]:
    """Return which part of the time each sort of operation takes."""
    x, call = torch.randn(layer.shape), ours(layer, approximation)
    call(x)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(repeats):
            call(x)
    times = {e.key: float(e.self_cpu_time_total) for e in profiler.key_averages()}
    total = sum(times.values())
    return {
        sort: sum(time for key, time in times.items() if key in names) / total
        for sort, names in SORTS.items()
    }


@torch.no_grad()
def rates(budget: float) -> Rates:
    """Measure the rates."""
    a, long = torch.randn(1, 1152, 1152), torch.randn(1 << 26)
    out = torch.empty_like(a)
    times = seconds(
        {
            "product": lambda: add_matmul_(out, a, a.mT, 0.0, 1.0),
            "read": partial(torch.sum, long),
            "write": lambda: long.fill_(1.0),
        },
        budget,
    )
    size = 4.0 * long.numel()
    return Rates(out.shape[-1] ** 3 / times["product"], size / times["read"], size / times["write"])

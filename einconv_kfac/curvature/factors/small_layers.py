"""Small layers with one kernel entry and one position, such as squeeze-and-excitation layers.

Their factor is one small product, and both approximations agree. What has to be decided depends on
shapes and options alone, so it is decided once for each; a call then takes the product, and adds
half of it to the transpose of that half.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import ONEDNN_LEAST_MACS
from einconv_kfac.curvature.factors.symmetric.update import Target, halves_are_faster
from einconv_kfac.geometry import Geometry

DTYPES = (torch.float32, torch.float64)
"""The dtypes whose inputs enter products as they are."""


@lru_cache(maxsize=4096)
def is_small(geometry: Geometry, batch: int, channels: int, device: str) -> bool:
    """Return whether a convolution has one entry and position, and a small product on a host."""
    single = geometry.groups == 1 and all(
        axis.kernel_size == axis.input_size == axis.output_size == 1 for axis in geometry.axes
    )
    met = single and all(len(axis.outputs(0)) for axis in geometry.axes)
    cheap = halves_are_faster(channels, batch) and channels**2 * batch < ONEDNN_LEAST_MACS
    return met and cheap and batch > 0 and profile_of(device).is_host


def small_factor(x: Tensor, geometry: Geometry, target: Target) -> Tensor | None:
    """Return ``beta out + alpha / N sum_n x x^T``, or none if it takes the ordinary way.

    Args:
        x: Input of shape ``[n, c, *i]``.
        geometry: The convolution.
        target: The factor to update, if any, which must fit, with ``beta`` and ``alpha``.
    """
    out, channels = target.out, x.shape[1]
    if not (_is_plain(x) and is_small(geometry, len(x), channels, x.device.type)):
        return None
    if not (_fits(out, x) if out is not None else target.beta == 0):
        return None
    a = x.reshape(-1, channels)
    half = a.new_empty(channels, channels)
    half.addmm_(a.T, a, beta=0.0, alpha=target.alpha / (2 * len(x)))
    if out is None:
        return (half + half.T).unsqueeze(0)
    if not target.beta:
        torch.add(half, half.T, out=out[0])
        return out
    return out.mul_(target.beta).add_(half + half.T)


def _is_plain(x: Tensor) -> bool:
    """Return whether an input enters the product as it is."""
    return type(x) is Tensor and x.dtype in DTYPES and x.ndim > 2


def _fits(out: Tensor, x: Tensor) -> bool:
    """Return whether the factor of ``x`` can be added to ``out``."""
    same = out.dtype == x.dtype and out.device == x.device
    return same and out.shape == (1, x.shape[1], x.shape[1]) and out.is_contiguous()

"""The profile of the central processor.

The prices are a fit to the layers of benchmarks/factors.py on one core, with products by oneDNN.
"""

from __future__ import annotations

import torch

from einconv_kfac.curvature.devices.processor import Processor, detected
from einconv_kfac.curvature.devices.profile import DeviceProfile, Prices

DOUBLE_PUMPED_HALF_SPEED_WIDTH = 40
"""Rows and columns of a product at half of MKL's full speed, on double-pumped processors."""


def profile_on(processor: Processor) -> DeviceProfile:
    """Return the profile of a processor."""
    half_speed = DOUBLE_PUMPED_HALF_SPEED_WIDTH if processor.is_double_pumped else 0
    return DeviceProfile(
        device="cpu",
        prices=Prices(9.2e-12, 0.0, 0.56e-9, 1.5e-9, 1.8e-6, region=50e-6, task=200e-6),
        smallest_chunk_elements=1 << 16,
        largest_chunk_elements=1 << 20,
        panel_rows=128,
        strip_rows=64,
        is_cached=True,
        is_host=True,
        has_exact_weight_gradients=True,
        multiplies_by_onednn=processor.mkl_is_narrow and _has_both_libraries(),
        mkl_half_speed_width=half_speed,
    )


def _has_both_libraries() -> bool:
    """Return whether torch was built with MKL and with oneDNN and its linear layer."""
    mkldnn, mkl = torch.backends.mkldnn.is_available(), torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    return bool(mkldnn and mkl) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


PROFILE = profile_on(detected())

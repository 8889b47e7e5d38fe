"""The profile of an NVIDIA GPU, whose prices follow from data sheets.

Weight gradients are not exact: cuDNN may round to TF32, and add in any order.
"""

from __future__ import annotations

import torch

from einconv_kfac.curvature.devices.profile import DeviceProfile, Prices

PROFILE = DeviceProfile(
    device="cuda",
    prices=Prices(4e-14, 64.0, 4e-12, 4e-12, 1e-5),
    smallest_chunk_elements=1 << 22,
    largest_chunk_elements=1 << 24,
    panel_rows=1024,
    strip_rows=1024,
    has_mixed_products=hasattr(torch.ops.aten.addmm, "dtype_out"),
)

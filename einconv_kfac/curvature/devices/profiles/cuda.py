"""The profile of an NVIDIA GPU, whose prices follow from data sheets.

They are those of an H100: 51 TFLOP/s in float32, 250 in TF32 and 500 in bfloat16 of large products,
which is about 60 per cent of the peaks, and 2 TB/s of copies. What an algorithm counts as a call is
0.2 to 0.7 launches, which tests/device counts; a launch takes the host 6 us. None was measured.

Weight gradients are not exact: cuDNN may round to TF32, and add in any order.
"""

from __future__ import annotations

import torch

from einconv_kfac.curvature.devices.profile import DeviceProfile, Prices

PROFILE = DeviceProfile(
    device="cuda",
    prices=Prices(4e-14, 64.0, 4e-12, 4e-12, 2.5e-6),
    smallest_chunk_elements=1 << 22,
    largest_chunk_elements=1 << 24,
    panel_rows=1024,
    strip_rows=1024,
    tf32_mac_price=0.2,
    mixed_mac_price=0.1,
    runs_triton=True,
    has_mixed_products=hasattr(torch.ops.aten.addmm, "dtype_out"),
)

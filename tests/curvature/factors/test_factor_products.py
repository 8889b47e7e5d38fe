"""Products by oneDNN and by torch's ordinary routine give the same factors."""

from __future__ import annotations

import pytest
import torch
from factor_definition import columns, factor

from einconv_kfac.curvature.factors import conv_input_factor
from einconv_kfac.geometry import convolution

SINGLE = {"rtol": 1e-5, "atol": 1e-4}


@pytest.mark.parametrize("narrow", [True, False])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_both_routines(
    narrow: bool,
    kernel_size: int,
    stride: int,
    layout: torch.memory_format,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("products", "pointwise"):
        name = f"einconv_kfac.curvature.factors.{module}.mkl_is_narrow"
        monkeypatch.setattr(name, lambda: narrow)
    x = torch.randn(3, 70, 9, 11, generator=torch.Generator().manual_seed(0))
    geometry = convolution(x.shape[2:], kernel_size, stride, 1)
    expected = factor(columns(x.double(), geometry), "expand")
    out, x = torch.ones(expected.shape), x.to(memory_format=layout)
    name = "im2col" if kernel_size > 1 else None
    for _ in range(2):
        conv_input_factor(
            x, kernel_size, stride, 1, algorithm=name, out=out.fill_(1.0), beta=0.5, alpha=2.0
        )
        torch.testing.assert_close(out.double(), 0.5 + 2 * expected, **SINGLE)
        assert torch.equal(out, out.mT)

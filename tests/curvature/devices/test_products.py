"""Products by oneDNN and by torch's ordinary routine are the same, and give the same factors."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from factor_definition import columns, factor
from processors import simulated
from torch import Tensor

from einconv_kfac.curvature.devices import products
from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.products import ONEDNN_LEAST_MACS, add_matmul_, product
from einconv_kfac.curvature.factors import conv_input_factor
from einconv_kfac.geometry import conv_geometry

SINGLE = {"rtol": 1e-5, "atol": 1e-4}

LAYOUTS: list[Callable[[Tensor], Tensor]] = [
    lambda t: t,
    lambda t: t.mT.contiguous().mT,
    lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
]


@pytest.fixture(params=["amd-avx512", "intel-avx512"], ids=["one_dnn", "ordinary"])
def by_one_dnn(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether large products are made by oneDNN, whatever the processor."""
    with simulated(request.param):
        yield profile_of("cpu").multiplies_by_onednn


def operands(layout: Callable[[Tensor], Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """Return two batches of matrices that are large enough for oneDNN."""
    torch.manual_seed(0)
    assert ONEDNN_LEAST_MACS <= 128 * 200 * 130
    return layout(torch.randn(groups, 128, 200)), layout(torch.randn(groups, 200, 130))


@pytest.mark.usefixtures("by_one_dnn")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 2])
def test_are_those_of_matmul(layout: Callable[[Tensor], Tensor], groups: int) -> None:
    left, right = operands(layout, groups)
    expected, target = left.double() @ right.double(), torch.ones(groups, 128, 130)
    with torch.no_grad():
        torch.testing.assert_close(product(left, right).double(), expected, **SINGLE)
        add_matmul_(target, left, right, 0.5, 2.0)
        torch.testing.assert_close(target.double(), 0.5 + 2 * expected, **SINGLE)
        add_matmul_(target.fill_(torch.nan), left, right, 0.0, 2.0)
    torch.testing.assert_close(target.double(), 2 * expected, **SINGLE)
    left.requires_grad_()
    assert product(left, right).requires_grad


def test_are_made_by_one_dnn_where_it_is_faster(
    by_one_dnn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    monkeypatch.setattr(products, "_by_one_dnn", lambda x, w: made.append(1) or x @ w.T)
    left, right = operands(LAYOUTS[0], 1)
    with torch.no_grad():
        product(left, right)
        product(left[:, :4], right)  # small
        product(left.double(), right.double())
    assert len(made) == by_one_dnn


@pytest.mark.usefixtures("by_one_dnn")
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 2)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_give_the_same_factors(kernel_size: int, stride: int, layout: torch.memory_format) -> None:
    x = torch.randn(3, 70, 19, 13, generator=torch.Generator().manual_seed(0))
    geometry = conv_geometry(x.shape[2:], kernel_size, stride, 1)
    expected = factor(columns(x.double(), geometry), "expand")
    out, x = torch.ones(expected.shape), x.to(memory_format=layout)
    name = "im2col" if kernel_size > 1 else None
    for _ in range(2):
        conv_input_factor(
            x, kernel_size, stride, 1, algorithm=name, out=out.fill_(1.0), beta=0.5, alpha=2.0
        )
        torch.testing.assert_close(out.double(), 0.5 + 2 * expected, **SINGLE)
        assert torch.equal(out, out.mT)

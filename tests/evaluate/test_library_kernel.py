"""The contractions by torch's own convolution against the other kernels' oracle."""

from __future__ import annotations

import pytest
import torch
from cases import CONV_CASES, UNMET, ConvCase, case_id
from drawn_cases import conv_cases
from hypothesis import given, settings
from oracles import reference

from einconv_kfac.evaluate import contract_convolution
from einconv_kfac.evaluate.kernels import library
from einconv_kfac.geometry import Geometry, conv_geometry


@pytest.fixture
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "ALWAYS_FASTER", ("cpu",))


def check(case: ConvCase) -> None:
    x, w, v = case.input(), case.weight(), case.output_like()
    for role, (first, second) in {"v": (x, w), "x": (w, v), "w": (x, v)}.items():
        assert library.applies(case.geometry, role, first, second)
    expected, pullback = torch.func.vjp(lambda x, w: reference(x, w, case.geometry), x, w)
    to_x, to_w = pullback(v)
    torch.testing.assert_close(contract_convolution(case.geometry, "v", x, w), expected)
    torch.testing.assert_close(contract_convolution(case.geometry, "x", w, v), to_x)
    torch.testing.assert_close(contract_convolution(case.geometry, "w", x, v), to_w)


@pytest.mark.usefixtures("_on_this_device")
@pytest.mark.parametrize("case", [*CONV_CASES, UNMET], ids=case_id)
def test_cases(case: ConvCase) -> None:
    check(case)


@pytest.mark.usefixtures("_on_this_device")
def test_drawn_geometries() -> None:
    @settings(max_examples=50)
    @given(conv_cases())
    def run(case: ConvCase) -> None:
        if case.geometry.ndim <= library.MOST_AXES:
            check(case)

    run()


def test_other_tensors() -> None:
    """Complex tensors, and those of devices without a library, are for the other kernels."""
    case = CONV_CASES[0]
    x, w = case.input(), case.weight()
    assert not library.applies(case.geometry, "v", x.cfloat(), w.cfloat())
    assert not library.applies(case.geometry, "v", x.float().to("meta"), w.float().to("meta"))
    assert not library.applies(case.geometry, "v", x.double(), w.double())


SINGLE = conv_geometry((6, 6), 1)
SQUARE = conv_geometry((6, 6), 3, padding=1)
STRIDED = conv_geometry((8, 8), 3, stride=2)
DEPTHWISE = conv_geometry((6, 6), 3, padding=1, groups=8)
STRIDED_DEPTHWISE = conv_geometry((8, 8), 3, stride=2, groups=8)
LARGE_DEPTHWISE = conv_geometry((9, 9), 7, padding=3, groups=8)


@pytest.mark.parametrize(
    ("geometry", "channels", "roles"),
    [
        (SINGLE, 8, ""),
        (SQUARE, 8, "vxw"),
        (SQUARE, 1, "vxw"),
        (STRIDED, 8, "vxw"),
        (STRIDED, 3, "vw"),
        (DEPTHWISE, 8, "vxw"),
        (STRIDED_DEPTHWISE, 8, "vxw"),
        (LARGE_DEPTHWISE, 8, "vx"),
    ],
)
def test_float32_on_the_host(
    geometry: Geometry, channels: int, roles: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which contractions are left to oneDNN, and that both ways give the same."""
    monkeypatch.setattr(library, "_has_onednn", lambda: True)
    torch.manual_seed(0)
    x = torch.randn(2, channels, *geometry.input_size)
    w = torch.randn(8, channels // geometry.groups, *geometry.kernel_size)
    v = torch.randn(2, 8, *geometry.output_size)
    for role, (first, second) in {"v": (x, w), "x": (w, v), "w": (x, v)}.items():
        assert library.applies(geometry, role, first, second) == (role in roles)
        got = contract_convolution(geometry, role, first, second)
        expected = contract_convolution(geometry, role, first.double(), second.double())
        torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(library, "_has_onednn", lambda: False)
    assert not library.applies(geometry, "v", x, w)

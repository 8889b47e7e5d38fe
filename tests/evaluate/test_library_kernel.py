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


@pytest.fixture(autouse=True)
def _on_this_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "DEVICES", ("cpu",))


def check(case: ConvCase) -> None:
    x, w, v = case.input(), case.weight(), case.output_like()
    assert library.applies(case.geometry, x)
    expected, pullback = torch.func.vjp(lambda x, w: reference(x, w, case.geometry), x, w)
    to_x, to_w = pullback(v)
    torch.testing.assert_close(contract_convolution(case.geometry, "v", x, w), expected)
    torch.testing.assert_close(contract_convolution(case.geometry, "x", w, v), to_x)
    torch.testing.assert_close(contract_convolution(case.geometry, "w", x, v), to_w)


@pytest.mark.parametrize("case", [*CONV_CASES, UNMET], ids=case_id)
def test_cases(case: ConvCase) -> None:
    check(case)


def test_drawn_geometries() -> None:
    @settings(max_examples=50)
    @given(conv_cases())
    def run(case: ConvCase) -> None:
        if case.geometry.ndim <= library.MOST_AXES:
            check(case)

    run()


def test_where_it_applies() -> None:
    case = CONV_CASES[0]
    assert not library.applies(case.geometry, case.input().cfloat())
    assert not library.applies(case.geometry, case.input().to("meta"))

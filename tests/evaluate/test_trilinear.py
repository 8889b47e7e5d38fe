"""The three contractions of a convolution against torch, and as derivatives of each other."""

from __future__ import annotations

import torch
from cases import ConvCase
from drawn_cases import conv_cases
from hypothesis import given, settings
from oracles import convolve, reference

from einconv_kfac.evaluate import contract_convolution


@settings(max_examples=60)
@given(conv_cases())
def test_contractions_on_drawn_geometries(case: ConvCase) -> None:
    geometry, x, weight, v = case.geometry, case.input(), case.weight(), case.output_like()
    y, pullback = torch.func.vjp(lambda x, w: reference(x, w, geometry), x, weight)
    torch.testing.assert_close(contract_convolution(geometry, "v", x, weight), y)
    torch.testing.assert_close(y, convolve(x, weight, geometry))
    for role, first, second, expected in zip("xw", (weight, x), (v, v), pullback(v)):
        result = contract_convolution(geometry, role, first, second)
        torch.testing.assert_close(result, expected)
        other = x if role == "x" else weight
        torch.testing.assert_close((result * other).sum(), (y * v).sum())  # adjoint

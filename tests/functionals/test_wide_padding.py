"""Padding and strides far beyond an image, whose windows are few, or too many for any tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.functionals import convNd, foldNd, unfoldNd
from einconv_kfac.modules import ConvNd

FAR = 2**29
WIDE: list[tuple[Any, dict[str, Any]]] = [
    ((3, 3), {"padding": FAR, "stride": FAR}),
    ((3, 3), {"padding": FAR - 3, "stride": FAR - 1}),
    ((3, 2), {"padding": (FAR, 1), "stride": (FAR, 2)}),
    ((4, 2), {"padding": (2**21, 0), "stride": (2**21 - 1, 1)}),
    ((2, 2), {"padding": FAR, "stride": FAR // 2, "dilation": FAR}),
]


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 4, 5, 6).double().requires_grad_()


def derivatives(y: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(y, tensors, y.detach().cos())


@pytest.mark.parametrize(("kernel", "options"), WIDE)
def test_unfold_and_fold_equal_torch(kernel: Any, options: dict[str, Any], x: Tensor) -> None:
    found, want = unfoldNd(x, kernel, **options), functional.unfold(x, kernel, **options)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(derivatives(found, (x,)), derivatives(want, (x,)))
    columns = torch.randn_like(want)
    torch.testing.assert_close(
        foldNd(columns, x.shape[2:], kernel, **options),
        functional.fold(columns, x.shape[2:], kernel, **options),
    )


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize(("kernel", "options"), WIDE)
def test_convolutions_equal_torch(
    kernel: Any, options: dict[str, Any], groups: int, x: Tensor
) -> None:
    weight = torch.randn(8, 4 // groups, *kernel).double().requires_grad_()
    options = options | {"groups": groups}
    found, want = convNd(x, weight, **options), functional.conv2d(x, weight, **options)
    torch.testing.assert_close(found, want)
    torch.testing.assert_close(derivatives(found, (x, weight)), derivatives(want, (x, weight)))


def test_infinities_do_not_reach_the_padding() -> None:

    x = torch.full((1, 1, 3, 1), float("inf"))
    options: dict[str, Any] = {"padding": (FAR, 0), "stride": (FAR, 1)}
    want = functional.unfold(x, (1, 1), **options)
    torch.testing.assert_close(unfoldNd(x, (1, 1), **options), want)


@pytest.mark.parametrize("simplify", [False, True])
def test_what_no_tensor_holds_is_refused_by_name(simplify: bool, x: Tensor) -> None:
    weight, words = torch.randn(8, 4, 3, 3).double(), "at most 281474976710656 output positions"
    with pytest.raises(ValueError, match=words):
        convNd(x, weight, padding=FAR, simplify=simplify)
    with pytest.raises(ValueError, match=words):
        unfoldNd(x, 3, padding=FAR, simplify=simplify)
    layer = ConvNd(2, 4, 8, 3, padding=FAR, padding_mode="replicate", simplify=simplify).double()
    with pytest.raises(ValueError, match=words):
        layer(x)

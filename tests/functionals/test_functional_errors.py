"""Bad input to every functional and layer: the argument, the rule and the value are named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from einconv_kfac.functionals import (
    conv_transposeNd,
    convNd,
    foldNd,
    unfoldNd,
    unfoldNd_transpose,
)
from einconv_kfac.modules import ConvNd, ConvTransposeNd

X, W = torch.rand(2, 4, 6, 6), torch.rand(6, 2, 3, 3)
T = torch.rand(4, 3, 3, 3)

CONVOLUTION_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: convNd(torch.rand(4), W, groups=2), "`x` must have shape"),
    (lambda: convNd(X[..., 0, 0], torch.rand(6, 4)), "`x` must have shape"),
    (lambda: convNd(X, torch.rand(6, 2, 3)), r"`weight` must have 4 dimensions .* \[6, 2, 3\]"),
    (
        lambda: convNd(X, W),
        r"`weight` must have shape .* groups=1 .* 4 channels, got \[6, 2, 3, 3\]",
    ),
    (lambda: convNd(X, W, groups=3), r"`weight` must have shape .* groups=3"),
    (lambda: convNd(X, W, groups=0), r"`weight` must have shape .* groups=0"),
    (lambda: convNd(X, W[:5], groups=2), r"`weight` .* divisible by groups=2, got 5"),
    (lambda: convNd(X, W, torch.rand(5), groups=2), r"`bias` .* shape \[6\], got \[5\]"),
    (lambda: convNd(X, W, torch.rand(6, 1), groups=2), r"`bias` .* shape \[6\], got \[6, 1\]"),
    (lambda: convNd(X, W, stride=0, groups=2), r"`stride` must be at least 1, got 0"),
    (lambda: convNd(X, W, stride=(1, 1, 1), groups=2), r"`stride` .* per dimension \(2\)"),
    (lambda: convNd(X, W, dilation=-1, groups=2), r"`dilation` must be at least 1, got -1"),
    (lambda: convNd(X, W, padding=-1, groups=2), r"`padding` must be at least 0, got"),
    (lambda: convNd(X, W, padding="full", groups=2), r"`padding` must be 'same'.* got 'full'"),
    (lambda: convNd(X, W, None, 2, "same", 1, 2), r"`padding`='same' .* stride 1, got stride 2"),
    (lambda: convNd(X, W, dilation=3, groups=2), r"`kernel_size` must fit .* span 7 .* got .* 6"),
    (lambda: convNd(X, W[..., :0], groups=2), r"`kernel_size` must be at least 1"),
    (lambda: convNd(X, W.double(), groups=2), r"`weight` must be torch.float32, .* torch.float64"),
    (lambda: convNd(X, W, W[:, 0, 0, 0].half(), groups=2), r"`bias` must be torch.float32"),
    (lambda: convNd(X, W.to("meta"), groups=2), r"`weight` must be on cpu, as `x`, got meta"),
]
TRANSPOSED_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: conv_transposeNd(X, W), r"`weight` must have shape .* 4 channels .* \[6, 2, 3, 3\]"),
    (lambda: conv_transposeNd(X, T, groups=3), r"`groups` must divide .* 4 channels, got 3"),
    (lambda: conv_transposeNd(X, T, torch.rand(4)), r"`bias` .* shape \[3\], got \[4\]"),
    (lambda: conv_transposeNd(X, T, None, 2, 0, 2), r"`output_padding` must be smaller .* got 2"),
    (lambda: conv_transposeNd(X, T, padding=9), r"`padding` must leave at least one output"),
    (lambda: conv_transposeNd(X, T, padding="same"), r"`padding` must be .* got 'same'"),
    (lambda: conv_transposeNd(X, T.double()), r"`weight` must be torch.float32"),
    (lambda: unfoldNd_transpose(X, 3, 0), r"`stride` must be at least 1, got 0"),
    (lambda: unfoldNd_transpose(X, 0), r"`kernel_size` must be at least 1, got 0"),
]
OTHER_ERRORS: list[tuple[Callable[[], Any], str]] = [
    (lambda: unfoldNd(X[0, 0], 3), r"`x` must have shape .* got \[6, 6\]"),
    (lambda: unfoldNd(X, (3, 3, 3)), r"`kernel_size` must have one entry per dimension"),
    (lambda: unfoldNd(X, 9), r"`kernel_size` must fit"),
    (lambda: foldNd(X, 6, 3), r"`x` must have shape .* got \[2, 4, 6, 6\]"),
    (lambda: foldNd(torch.rand(2, 7, 4), 5, 2), r"`x` must have shape .*channels \* 2"),
    (lambda: foldNd(torch.rand(2, 6, 3), 5, 2), r"`x` must have shape .* 4\], got \[2, 6, 3\]"),
    (lambda: ConvNd(2, 4, 6, 3, groups=3), r"in_channels must be divisible by groups"),
    (lambda: ConvNd(2, 4, 6, (3, 3, 3)), r"`kernel_size` must have one entry per dimension"),
    (lambda: ConvNd(2, 4, 6, 3, padding=-1), r"`padding` must be at least 0"),
    (lambda: ConvNd(2, 4, 6, 3, padding_mode="mirror"), r"padding_mode"),
    (lambda: ConvNd(1, 2, 2, 3, padding=4, padding_mode="circular")(torch.rand(1, 2, 3)),
     r"`padding` must be at most 3 for mode 'circular'"),
    (lambda: ConvTransposeNd(2, 4, 6, 3, stride=-1), r"`stride` must be at least 1"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("call", "message"), [*CONVOLUTION_ERRORS, *TRANSPOSED_ERRORS, *OTHER_ERRORS]
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("value", [1.5, True, "3", (2, 1.0)])
def test_sizes_are_integers(value: Any) -> None:
    with pytest.raises(TypeError, match="`stride` must be an integer"):
        convNd(X, W, stride=value, groups=2)


@pytest.mark.parametrize(
    "call",
    [
        ConvNd(2, 4, 6, 3),
        ConvNd(2, 4, 6, 3, padding=1, padding_mode="reflect", simplify=False),
        ConvTransposeNd(2, 4, 6, 3),
        lambda x: convNd(X, x),
        lambda x: convNd(X, W, x, groups=2),
        lambda x: unfoldNd(x, 3),
        lambda x: unfoldNd_transpose(x, 3),
        lambda x: foldNd(x, (4, 4), 3),
    ],
)
def test_sparse_tensors_are_named(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match=r"dense tensor, got the layout torch\.sparse_coo"):
        call(X.to_sparse())

"""The unfolded input of a transposed convolution against torch and unfoldNd."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from oracles import TRANSPOSED, unfolded_transposed
from torch import nn

from einconv_kfac.geometry import conv_transpose_geometry
from einconv_kfac.modules import UnfoldTransposeNd

LAYERS: dict[int, Any] = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"dilation": 2},
    {"stride": 3, "dilation": 2, "padding": 2},
]
CASES = pytest.mark.parametrize("options", OPTIONS, ids=str)
DIMENSIONS = pytest.mark.parametrize("ndim", [1, 2, 3])
SIMPLIFY = pytest.mark.parametrize("simplify", [True, False], ids=["simplified", "plain"])


@DIMENSIONS
@CASES
@SIMPLIFY
def test_kernel_times_unfolded_input_is_the_convolution(
    ndim: int, options: dict[str, Any], simplify: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 4, *(5, 4, 3)[:ndim], dtype=torch.float64)
    weight = torch.randn(4, 3, *(3, 2, 3)[:ndim], dtype=torch.float64)
    layer = UnfoldTransposeNd(tuple(weight.shape[2:]), **options, simplify=simplify)
    matrix = weight.transpose(0, 1).flatten(1)  # [ci, (co k)]
    expected = TRANSPOSED[ndim](x, weight, **options)
    torch.testing.assert_close((matrix @ layer(x)).view_as(expected), expected)
    geometry = conv_transpose_geometry(x.shape[2:], weight.shape[2:], **options)
    torch.testing.assert_close(layer(x), unfolded_transposed(x, geometry).flatten(1, 2))


@DIMENSIONS
@CASES
def test_equals_unfoldnd(ndim: int, options: dict[str, Any]) -> None:
    unfoldnd = pytest.importorskip("unfoldNd")
    x = torch.randn(2, 3, *(5, 4, 3)[:ndim], dtype=torch.float64)
    ours, theirs = UnfoldTransposeNd(2, **options), unfoldnd.UnfoldTransposeNd(2, **options)
    torch.testing.assert_close(ours(x), theirs(x))


@DIMENSIONS
@pytest.mark.parametrize("whole", [False, True])
def test_output_size(ndim: int, whole: bool) -> None:
    x = torch.randn(2, 4, *(5, 4, 3)[:ndim], dtype=torch.float64)
    torchs = LAYERS[ndim](4, 3, 3, stride=3, padding=1, bias=False, dtype=torch.float64)
    size = [s + 1 for s in torchs(x).shape[2:]]
    sizes = [2, 3, *size] if whole else size
    expected = torchs(x, sizes)
    unfolded = UnfoldTransposeNd(3, stride=3, padding=1)(x, sizes)
    matrix = torchs.weight.transpose(0, 1).flatten(1)
    torch.testing.assert_close((matrix @ unfolded).view_as(expected), expected)


def test_four_dimensions_and_types() -> None:
    x = torch.randint(0, 5, (2, 1, 2, 2, 2, 2))
    u = UnfoldTransposeNd(2, stride=2)(x)
    assert u.shape == (2, 16, 256)
    assert torch.equal(u.sum(), 16 * x.sum())
    z = torch.randn(2, 3, 4, dtype=torch.complex128)
    torch.testing.assert_close(UnfoldTransposeNd(2)(z).real, UnfoldTransposeNd(2)(z.real))


def test_shown_copied_and_saved() -> None:
    layer = UnfoldTransposeNd((3, 2), stride=2, output_padding=1)
    assert repr(layer) == (
        "UnfoldTransposeNd(kernel_size=(3, 2), stride=2, padding=0, output_padding=1, dilation=1)"
    )
    x = torch.rand(1, 2, 3, 3)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    assert layer.state_dict() == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel_size": 0}, "`kernel_size` must be at least 1, got 0"),
        ({"stride": -1}, "`stride` must be at least 1, got -1"),
        ({"output_padding": -1}, "`output_padding` must be at least 0, got -1"),
        ({"padding": "same"}, "`padding` must be 'valid' or numbers .* got 'same'"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        UnfoldTransposeNd(**{"kernel_size": 2, **options})


@pytest.mark.parametrize("size", [[3, 3], [9, 9], [7], [1, 2, 7, 7, 7]])
def test_bad_output_sizes_are_named(size: list[int]) -> None:
    x = torch.rand(1, 2, 3, 3)
    with pytest.raises(ValueError, match=r"`output_size` must"):
        UnfoldTransposeNd(2, stride=2)(x, size)
    UnfoldTransposeNd(2, stride=2)(x, [7, 7])

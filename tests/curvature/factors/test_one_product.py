"""Factors that are one product of columns in memory: each way to multiply, in each use."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from factor_definition import factor
from torch import Tensor

from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    linear_input_factor,
    one_product,
)
from einconv_kfac.curvature.factors.one_product import is_one_product
from einconv_kfac.curvature.factors.symmetric import update

Shape = tuple[int, int, int]
SHAPES: dict[str, Shape] = {  # examples, rows, positions
    "one position": (6, 5, 1),
    "few rows": (4, 9, 25),
    "more rows than positions": (3, 30, 19),
    "many short examples": (20, 7, 4),
}


@pytest.fixture(params=[1, 2], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def no_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("The factor was divided into panels.")

    monkeypatch.setattr(update.Update, "add_product_", fail)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pixels(columns: Tensor, **options: Any) -> Tensor:
    """The factor of a 1x1 convolution."""
    return conv_input_factor(columns.unsqueeze(2), 1, **options)


def every_other_pixel(columns: Tensor, **options: Any) -> Tensor:
    """The factor of a 1x1 convolution with a stride, between whose inputs are others."""
    x = torch.stack([columns, torch.full_like(columns, torch.nan)], 3).flatten(2)
    return conv_input_factor(x, 1, stride=2, **options)


def channels_last(columns: Tensor, **options: Any) -> Tensor:
    """The factor of a 1x1 convolution of an input with its channels next to each other."""
    x = columns.unsqueeze(3).contiguous(memory_format=torch.channels_last)
    return conv_input_factor(x, 1, **options)


def features(columns: Tensor, **options: Any) -> Tensor:
    """The factor of a linear layer."""
    return linear_input_factor(columns.mT.contiguous(), **options)


USES = (pixels, every_other_pixel, channels_last, features)


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_equals_the_definition_and_is_symmetric(
    use: Callable[..., Tensor], name: str, bias: bool
) -> None:
    columns = draw(*SHAPES[name])
    expected = factor(columns.unsqueeze(1), "expand", bias)
    before = torch.eye(expected.shape[1], dtype=torch.float64).unsqueeze(0)
    got = use(columns, bias=bias)
    kept = use(columns, bias=bias, out=(out := before.clone()), beta=0.5, alpha=2.0)
    written = use(columns, bias=bias, out=torch.full_like(before, torch.nan))
    assert kept is out
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(written, expected)
    torch.testing.assert_close(kept, 0.5 * before + 2 * expected)
    assert all(torch.equal(each, each.mT) for each in (got, kept, written))


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_and_reduced_inputs(name: str) -> None:
    columns = draw(*SHAPES[name])
    got = conv_output_factor(columns.unsqueeze(0))
    torch.testing.assert_close(got, factor(columns.unsqueeze(1), "expand") / columns.shape[2])
    got = linear_input_factor(columns.mT.contiguous(), "reduce", bias=True)
    torch.testing.assert_close(got, factor(columns.unsqueeze(1), "reduce", bias=True))
    assert torch.equal(got, got.mT)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_factors_too_large_for_a_cache(
    use: Callable[..., Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(one_product, "CACHED_ROWS", 1)  # the lower triangle is copied
    test_equals_the_definition_and_is_symmetric(use, name, bias=False)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
def test_is_not_rounded_by_autocast(use: Callable[..., Tensor], name: str) -> None:
    columns = draw(*SHAPES[name]).float()
    expected = factor(columns.double().unsqueeze(1), "expand", bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = use(columns, bias=True)
        plain = use(columns)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(plain, got[:, :-1, :-1], rtol=1e-4, atol=1e-4)
    assert got.dtype == torch.float32


def test_large_or_other_inputs_are_divided() -> None:
    assert not is_one_product(draw(1).half(), 2, 2, 1)
    assert not is_one_product(draw(1), 2, 2000, 100)  # copying the result is most of the work
    assert not is_one_product(draw(1), 2, 1000, 1 << 20)
    assert not is_one_product(draw(1), 0, 4, 1)


def test_few_rows_are_one_product_beside_onednn(
    threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile = replace(one_product.profile_of("cpu"), multiplies_by_onednn=True)
    monkeypatch.setattr(one_product, "profile_of", lambda _: profile)
    monkeypatch.setattr(one_product, "_is_fastest", one_product._is_fastest.__wrapped__)
    like, single = draw(1), draw(1).float()
    assert is_one_product(single, 8, 64, 128)
    assert is_one_product(single, 8 * threads, 64, 128)
    assert not is_one_product(single, 32 * threads, 64, 128)
    assert not is_one_product(single, 8, 256, 128)
    assert is_one_product(like, 32 * threads, 64, 128)  # oneDNN multiplies no doubles


def test_positions_in_the_padding_count_for_the_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # such layers are divided
    got = conv_input_factor(torch.ones(2, 1, 3), 1, padding=1, bias=True)
    assert torch.equal(got, got.new_tensor([[[3.0, 3.0], [3.0, 5.0]]]))


def test_an_unfit_target_is_refused_as_ever() -> None:
    with pytest.raises(ValueError, match="`out` must be contiguous of shape"):
        features(draw(4, 3, 1), out=torch.zeros(1, 4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="`beta` must be 0 without `out`"):
        features(draw(4, 3, 1), beta=0.5)

"""Caches: bounded, listed, cleared, thread-safe, and free of tensors that belong elsewhere."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from einconv_kfac.expressions import cache_clear, cache_info, convNd_forward
from einconv_kfac.expressions.constants import ConstantCache, constant
from einconv_kfac.functionals import convNd
from einconv_kfac.geometry import Axis
from einconv_kfac.network import Delta, Pattern

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _empty_caches() -> None:
    cache_clear()


def test_repeated_calls_hit() -> None:
    x, weight = torch.rand(2, 3, 9), torch.rand(4, 3, 3)
    for _ in range(3):
        convNd_forward.einsum_expression(x, weight, stride=[2], padding=[1])
        convNd(x, weight)
    info = cache_info()
    assert info["expressions.convNd_forward.einsum_expression"][:2] == (2, 1)
    assert info["functionals.conv._geometry"][:2] == (2, 1)
    assert info["expressions.constant"].hits == 2
    assert all(entry.maxsize is not None for entry in info.values())
    cache_clear()
    assert all(entry[:2] == (0, 0) and entry.currsize == 0 for entry in cache_info().values())


def test_constants_are_kept_per_type_and_bounded() -> None:
    cache = ConstantCache(maxsize=2)
    first = cache(Delta(2), CPU, torch.float32)
    assert cache(Delta(2), CPU, torch.float32) is first
    assert cache(Delta(2), CPU, torch.float64).dtype == torch.float64
    cache(Delta(3), CPU, torch.float32)
    assert cache.cache_info().currsize == 2
    assert cache(Delta(2), CPU, torch.float32) is not first


def test_foreign_tensors_are_not_kept() -> None:
    pattern = Pattern(Axis(5, 2))
    with torch.inference_mode():
        assert constant(pattern, CPU, torch.float32).is_inference()
    with FakeTensorMode():
        assert "Fake" in type(constant(pattern, CPU, torch.float32)).__name__
    constant(pattern, torch.device("meta"), torch.float32)
    torch.vmap(lambda x: x * constant(pattern, CPU, torch.float32))(torch.rand(2))
    assert constant.cache_info().currsize <= 1
    kept = constant(pattern, CPU, torch.float32)
    assert type(kept) is torch.Tensor
    assert not kept.is_inference()
    weight = torch.rand(2, 1, 2, requires_grad=True)
    convNd(torch.rand(1, 1, 5), weight, simplify=False).sum().backward()


def test_default_device_and_type_do_not_leak() -> None:
    with torch.device("meta"):
        assert constant(Delta(4), CPU, torch.float64).device == CPU


def test_threads_agree() -> None:
    def evaluated(size: int) -> bool:
        x, weight = torch.ones(1, 1, 4 + size % 5), torch.ones(1, 1, 2)
        equation, operands, shape = convNd_forward.einsum_expression(x, weight)
        return bool((torch.einsum(equation, *operands).reshape(shape) == 2).all())

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(evaluated, range(200)))

"""Max pooling in replays on the host, beside torch's own functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.optim.replay import host_pooling
from einconv_kfac.optim.replay.host_pooling import HostPooling

CHANNELS = host_pooling.FEWEST_CHANNELS
OPTIONS = [*itertools.product((2, 3), (None, 1, 2, 3), (0, 1), (1, 2), (False, True))]


@pytest.fixture(autouse=True)
def _every_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_pooling, "FEWEST_ENTRIES", 0)


def images(*sizes: int, channels: int = CHANNELS) -> Tensor:
    """Return images whose windows have equal entries."""
    return torch.randint(-2, 3, (2, channels, *sizes)).double()


def dual(pool: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> tuple[Tensor, Tensor]:
    """Return pooled values and tangents."""
    with torch.no_grad(), forward_ad.dual_level():
        return forward_ad.unpack_dual(pool(forward_ad.make_dual(x, tangent)))


@pytest.mark.parametrize("pool", [functional.max_pool2d, functional.max_pool3d])
def test_values_and_tangents_are_those_of_torch(pool: Any) -> None:
    torch.manual_seed(0)
    x = images(9, 8) if pool is functional.max_pool2d else images(6, 5, 7)
    tangent = torch.randn_like(x)
    for options in OPTIONS:
        value = pool(x, *options)
        _, moved = dual(lambda x, options=options: pool(x, *options), x, tangent)
        with HostPooling():
            assert torch.equal(pool(x, *options), value), options
            found = dual(lambda x, options=options: pool(x, *options), x, tangent)
        assert torch.equal(found[0], value), options
        assert torch.equal(found[1], moved), options


def test_each_dimension_has_options_of_its_own() -> None:
    torch.manual_seed(0)
    x = images(9, 8)
    options = {"kernel_size": (2, 3), "stride": (3, 1), "padding": (0, 1), "dilation": (2, 1)}
    with HostPooling():
        found = torch.max_pool2d(input=x, **options)
    assert torch.equal(found, torch.max_pool2d(x, **options))


def test_nan_stays() -> None:
    x = images(4, 4)
    x[0, 0, 0, 0] = x[1, 2, 1, 3] = torch.nan
    with HostPooling():
        found = functional.max_pool2d(x, 2)
    torch.testing.assert_close(found, functional.max_pool2d(x, 2), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("case", ["graph", "channels last", "integers", "one entry"])
def test_torch_pools_the_others(case: str) -> None:
    x = images(4, 4)
    kernel = 1 if case == "one entry" else 2
    if case == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    x = x.long() if case == "integers" else x.requires_grad_(case == "graph")
    known = functional.max_pool2d(x, kernel)
    with HostPooling() as pooling:
        found = functional.max_pool2d(x, kernel)
    assert pooling.is_used
    assert torch.equal(found, known)
    assert found.data_ptr() != x.data_ptr()
    if case == "graph":
        assert "MaxPool2D" in found.grad_fn.name()


def test_indices_are_those_of_torch() -> None:
    x = images(4, 4)
    known = functional.max_pool2d(x, 2, return_indices=True)
    with HostPooling():
        found = functional.max_pool2d(x, 2, return_indices=True)
    assert all(torch.equal(own, other) for own, other in zip(found, known))


def test_few_channels_with_tangents_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    x = images(4, 4, channels=CHANNELS - 1)
    tangent = torch.randn_like(x)
    known = dual(lambda x: functional.max_pool2d(x, 2), x, tangent)
    monkeypatch.setattr(host_pooling, "_with_tangent", None)
    with HostPooling():
        found = dual(lambda x: functional.max_pool2d(x, 2), x, tangent)
    assert all(torch.equal(own, other) for own, other in zip(found, known))


class Functional(nn.Module):
    """A network that pools by a function."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.linear = nn.Conv2d(1, CHANNELS, 3), nn.Linear(CHANNELS * 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.conv(x).relu(), 2)
        return self.linear(x.flatten(1))


def with_module() -> nn.Module:
    """Return a network that pools by a module."""
    conv, pool = nn.Conv2d(1, CHANNELS, 3), nn.MaxPool2d(2)
    return nn.Sequential(conv, nn.ReLU(), pool, nn.Flatten(), nn.Linear(CHANNELS * 4, 3))


@pytest.mark.parametrize("make", [Functional, with_module])
def test_training_pools_in_replays_and_ends_where_it_did(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: dict[str, int] = {"value": 0, "tangent": 0}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            counts[name] += 1
            return function(*args)

        return call

    def trained() -> list[Tensor]:
        torch.manual_seed(0)
        model, loss_fn = make().double(), nn.CrossEntropyLoss()
        optimizer = KFAC(model, loss_fn)
        for _ in range(6):
            x, y = torch.randn(16, 1, 6, 6).double(), torch.randint(0, 3, (16,))
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
        return [p.detach() for p in model.parameters()]

    for name, function in (("value", "_maxima"), ("tangent", "_with_tangent")):
        own = counted(name, getattr(host_pooling, function))
        monkeypatch.setattr(host_pooling, function, own)
    found = trained()
    assert all(counts.values())
    monkeypatch.setattr(host_pooling, "FEWEST_ENTRIES", 10**9)
    for own, other in zip(found, trained()):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-12)

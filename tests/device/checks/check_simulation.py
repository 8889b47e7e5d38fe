"""The simulation itself: it notes what a GPU would do, and computes what the processor does."""

from __future__ import annotations

import copy

import pytest
import torch
from simulated_device import DeviceTensor, held, simulated, to_device
from torch import nn


def test_launches_waits_and_mixtures_are_noted() -> None:
    with simulated(measures=True) as record:
        x = to_device(torch.randn(4, 5))
        record.reset()
        y = x @ x.T + 1
        assert (record.launches, record.waited, record.operations) == (2, 0, 2 * 4 * 5 * 4)
        assert y.device.type == "cuda"
        assert isinstance(y, DeviceTensor)
        record.reset()
        assert y[0, 0].item() == held(y)[0, 0].item()
        y.cpu(), torch.ones(2).to("cuda"), x[[0, 1]], y.tolist()
        assert record.waited == 5
        assert not record.mixtures
        record.reset()
        _ = x + torch.ones(4, 5)
        assert record.mixtures.total() == 1
        assert record.waited == 0
        record.reset()
        torch._foreach_mul_([torch.ones(3, device="cuda")] * 90, 2.0)
        assert [launch.kernels for launch in record.launched if "foreach" in launch.name] == [3]


@pytest.mark.parametrize("training", [True, False])
def test_autograd_is_that_of_the_processor(training: bool) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten()).double()
    here.train(training)
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    with simulated() as record:
        there = to_device(copy.deepcopy(here))
        assert all(parameter.is_cuda for parameter in there.parameters())
        there(to_device(x)).square().sum().backward()
        assert not record.mixtures
    here(x).square().sum().backward()
    for ours, theirs in zip(here.parameters(), there.parameters()):
        torch.testing.assert_close(held(theirs.grad), ours.grad, rtol=1e-12, atol=1e-12)


def test_generators_go_on() -> None:
    with simulated():
        generator = torch.Generator("cuda").manual_seed(3)
        draws = [torch.randn(4, generator=generator, device="cuda") for _ in range(2)]
        generator.manual_seed(3)
        again = torch.randn(4, generator=generator, device="cuda")
    assert torch.equal(held(again), held(draws[0]))
    assert not torch.equal(held(draws[0]), held(draws[1]))


def test_shapes_alone_are_enough_to_count() -> None:
    with simulated(shapes_only=True) as record:
        x = to_device(torch.empty(64, 256))
        record.reset()
        assert (x.T @ x).shape == (256, 256)
        assert record.operations == 2 * 64 * 256 * 256

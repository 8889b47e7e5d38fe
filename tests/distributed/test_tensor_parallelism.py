"""Tensor parallelism is refused by name, also where it begins after the optimizer was made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from einconv_kfac import KFAC, KFACPreconditioner


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("make", [KFAC, partial(KFAC, lr=0.1, adaptive=False), KFACPreconditioner])
def test_parallel_layers_after_the_optimizer_are_refused(make: Callable[..., Any]) -> None:
    model, loss_fn = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3)), nn.CrossEntropyLoss()
    opt = make(model, loss_fn)
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, init_device_mesh("cpu", (1,)), plan)
    loss = loss_fn(model(torch.rand(5, 4)), torch.arange(5) % 3)
    with pytest.raises(RuntimeError, match=r"DTensor for '0\.weight' since.*Tensor parallelism is"):
        loss.backward()
    opt.remove_hooks()


@pytest.mark.usefixtures("group")
def test_parallel_layers_before_the_optimizer_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    parallelize_module(model, init_device_mesh("cpu", (1,)), {"0": ColwiseParallel()})
    with pytest.raises(ValueError, match=r"DTensor for '0\.weight'"):
        KFAC(model, nn.CrossEntropyLoss())

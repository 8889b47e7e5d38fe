"""Optimizers in other processes and threads."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_module
from torch.testing._internal.distributed.fake_pg import FakeStore

from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors
from einconv_kfac.distributed.detection import workers_of

MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}, {"inverse": "ekfac"}]


def trained(options: dict[str, Any], seed: int = 0) -> tuple[nn.Module, nn.Module, KFAC]:
    """A model that has taken steps."""
    model, loss_fn = conv_net(seed), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for step in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=step))
    opt.zero_grad()
    return model, loss_fn, opt


def train_on(model: nn.Module, loss_fn: nn.Module, opt: KFAC) -> list[float]:
    """Take steps in another process."""
    for step in range(3, 6):
        train_step(model, loss_fn, opt, image_batch(seed=step))
    found: list[float] = weights(model).tolist()
    return found


@pytest.fixture(scope="module")
def spawned() -> Iterator[ProcessPoolExecutor]:
    """A process that was spawned."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("options", MODES)
def test_an_optimizer_is_sent_to_a_spawned_process(
    options: dict[str, Any], spawned: ProcessPoolExecutor
) -> None:
    found = spawned.submit(train_on, *trained(options)).result()
    expected = trained(options)
    for step in range(3, 6):
        train_step(*expected, image_batch(seed=step))
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), weights(expected[0]))


def test_threads_train_as_one_after_the_other() -> None:
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()
    models = [conv_net(seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(run_trained, models))
    apart = [run_trained(conv_net(seed)) for seed in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(together, apart))
    assert flags == (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
    )


def run_trained(model: nn.Module) -> Tensor:
    """The parameters of a model that takes steps."""
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for step in range(5):
        train_step(model, loss_fn, opt, image_batch(seed=step))
    return weights(model)


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_a_process_group_that_came_later_is_refused_by_a_step(kind: Any) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = kind(model, loss_fn)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    before = weights(model)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(RuntimeError, match="must be made after `init_process_group`"):
            opt.step()
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(before, weights(model))
    opt.step()  # the remedy


def test_factors_in_several_processes_are_refused() -> None:
    model, loss_fn, data = conv_net(), nn.CrossEntropyLoss(), [image_batch()]
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(RuntimeError, match="must have the DistributedDataParallel of a model"):
            kronecker_factors(model, loss_fn, data)
    finally:
        torch.distributed.destroy_process_group()
    assert len(kronecker_factors(model, loss_fn, data)) == 3  # the remedy


def split_(model: nn.Module) -> None:
    """Split the parameters of a model between two devices."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        distribute_module(model, init_device_mesh("cpu", (2,)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_split_parameters_are_refused(kind: Any) -> None:
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    split_(model)
    with pytest.raises(ValueError, match="must be whole tensors, got a DTensor for 'weight'"):
        kind(model, loss_fn)
    kind(nn.Linear(4, 3), loss_fn)  # the remedy
    data = [(torch.ones(2, 4), torch.zeros(2, dtype=torch.long))]
    with pytest.raises(ValueError, match="must be whole tensors, got a DTensor for 'weight'"):
        kronecker_factors(model, loss_fn, data)


@pytest.mark.parametrize("kind", [KFAC, KFACPreconditioner])
def test_parameters_that_are_split_later_are_refused(kind: Any) -> None:
    model, loss_fn = nn.Linear(4, 3), nn.CrossEntropyLoss()
    opt = kind(model, loss_fn)
    loss_fn(model(torch.ones(2, 4)), torch.zeros(2, dtype=torch.long)).backward()
    split_(model)
    with pytest.raises(RuntimeError, match=r"got another one for '(weight|bias)'. Make a new"):
        opt.step()


@pytest.mark.parametrize(
    "made",
    [
        lambda model: KFAC(model, nn.CrossEntropyLoss()),
        lambda model: KFAC(model, nn.CrossEntropyLoss(), lr=0.1, adaptive=False),
        lambda model: KFACPreconditioner(model, nn.CrossEntropyLoss()),
    ],
    ids=["automatic", "fixed", "preconditioner"],
)
def test_normalisation_over_all_workers_is_refused(made: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    synchronized = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(*model))
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(ValueError, match=r"got '1' \(SyncBatchNorm\). Use BatchNorm, or"):
            made(synchronized)
        assert workers_of(model).size == 2  # the remedy
    finally:
        torch.distributed.destroy_process_group()
    made(synchronized)  # one process normalises over its own batch


def normalised(*, synchronized: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3))
    return nn.SyncBatchNorm.convert_sync_batchnorm(model) if synchronized else model


def trained_as(
    model: nn.Module, given: nn.Module, called: nn.Module, **options: Any
) -> torch.Tensor:
    x = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    x = x.to(next(model.parameters()).dtype)
    loss_fn, y = nn.CrossEntropyLoss(), torch.arange(24) % 3
    opt = KFAC(given, loss_fn, **options)
    for _ in range(3):
        opt.zero_grad()
        loss_fn(called(x), y).backward()
        opt.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
@pytest.mark.parametrize("is_given", [True, False])
def test_data_parallel_on_one_device(options: Any, is_given: bool) -> None:
    plain, model = normalised(), normalised()
    wrapper = nn.DataParallel(model, device_ids=[])
    wrapper.device_ids = []  # as on a machine without GPUs
    found = trained_as(model, wrapper if is_given else model, wrapper, **options)
    assert torch.equal(found, trained_as(plain, plain, plain, **options))


def test_data_parallel_on_several_devices_is_refused() -> None:
    wrapper = nn.DataParallel(normalised())
    wrapper.device_ids = [0, 1]
    with pytest.raises(ValueError, match="got DataParallel on several devices"):
        KFAC(wrapper, nn.CrossEntropyLoss())


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
def test_synchronized_statistics_of_one_process(options: Any) -> None:
    """Equal with fixed rates; the automatic step's tangents are computed in another way."""
    dtype = torch.float32 if options else torch.float64
    models = normalised().to(dtype), normalised(synchronized=True).to(dtype)
    first, second = (trained_as(model, model, model, **options) for model in models)
    if options:
        assert torch.equal(first, second)
    else:
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-13)

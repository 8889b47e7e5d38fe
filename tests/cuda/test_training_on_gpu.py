"""Training on a GPU: the processor's steps, mixed precision, bad batches, checkpoints, waits."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from gpu_cases import (
    CPU,
    DEVICE,
    NEEDS_DEVICE,
    NEEDS_GPU,
    ON_GPU,
    batches,
    network,
    optimizer,
    train,
)
from torch import nn

from einconv_kfac import KFACPreconditioner

pytestmark = NEEDS_DEVICE
FIXED = {"adaptive": False, "lr": 0.1}
PERIODS = {"factor_update_period": 2, "inverse_update_period": 4}
OPTIONS: dict[str, dict[str, Any]] = {
    "fixed": FIXED,
    "clipped": {**FIXED, "nesterov": True, "kl_clip": 1e-2, "max_step_norm": 0.1},
    "automatic": {},
    "safeguard": {"safeguard": True, "weight_decay": 1e-3},
    "exact": {"inverse": "exact"},
    "ekfac": {"inverse": "ekfac"},
    "reduce": {"approximation": "reduce"},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_those_of_the_processor(name: str) -> None:
    """In float64 and with an exact Fisher, so that nothing but rounding differs."""
    losses = []
    for device in (CPU, DEVICE):
        model = network(torch.float64).to(device)
        loss_fn, opt = optimizer(model, fisher="exact", **PERIODS, **OPTIONS[name])
        losses.append(train(model, loss_fn, opt, batches(6, torch.float64), device))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["automatic", "fixed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [True, False])
def test_mixed_precision(name: str, dtype: torch.dtype, channels_last: bool) -> None:
    model = network().to(DEVICE)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    loss_fn, opt = optimizer(model, **OPTIONS[name])
    scaler = torch.amp.GradScaler(DEVICE.type, enabled=dtype == torch.float16 and ON_GPU)
    losses = []
    for x, y in [*batches(1)] * 12:
        opt.zero_grad()
        with torch.autocast(DEVICE.type, dtype):
            loss = loss_fn(model(x.to(DEVICE)), y.to(DEVICE))
        scaler.scale(loss).backward()
        scaler.step(opt)
        scaler.update()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("name", ["automatic", "fixed"])
def test_a_bad_batch_is_skipped_and_the_device_lives(name: str) -> None:
    """An assertion on the device, as of ``torch.multinomial``, would end its use."""
    model = network().to(DEVICE)
    loss_fn, opt = optimizer(model, **OPTIONS[name])
    (x, y), *_ = batches(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(model, loss_fn, opt, [(x, y), (x * float("nan"), y), (x, y)], DEVICE)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.parametrize(("source", "target"), [(CPU, DEVICE), (DEVICE, CPU), (DEVICE, DEVICE)])
def test_checkpoints_move_between_devices(source: torch.device, target: torch.device) -> None:
    data, options = batches(5, torch.float64), {"fisher": "exact", **PERIODS}
    reference = network(torch.float64)
    expected = train(reference, *optimizer(reference, **options), data, CPU)
    model = network(torch.float64).to(source)
    loss_fn, opt = optimizer(model, **options)
    train(model, loss_fn, opt, data[:3], source)
    other = copy.deepcopy(model).to(target)
    loss_fn, resumed = optimizer(other, **options)
    resumed.load_state_dict(opt.state_dict())
    found = train(other, loss_fn, resumed, data[3:], target)
    torch.testing.assert_close(found, expected[3:], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["automatic", "fixed"])
def test_a_model_may_move_after_the_optimizer_is_made(name: str) -> None:
    model = network()
    loss_fn, opt = optimizer(model, **OPTIONS[name])
    first = train(model, loss_fn, opt, [*batches(1)] * 2, CPU)
    model.to(DEVICE)
    last = train(model, loss_fn, opt, [*batches(1)] * 6, DEVICE)
    assert last[-1] < first[0]


@NEEDS_GPU
@pytest.mark.parametrize(("name", "most"), [("fixed", 1), ("automatic", 5)])
def test_waits_of_an_ordinary_step(name: str, most: int) -> None:
    """The numbers are those of tests/device; lower them together."""
    model = network().to(DEVICE)
    loss_fn, opt = optimizer(model, **OPTIONS[name])
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 10_000
    opt.load_state_dict(state)
    train(model, loss_fn, opt, batches(3), DEVICE)
    x, y = (tensor.to(DEVICE) for tensor in batches(1)[0])
    opt.zero_grad()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            loss_fn(model(x), y).backward()
            opt.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    own = [warning for warning in seen if "synchroniz" in str(warning.message)]
    assert len(own) <= most, sorted({f"{w.filename}:{w.lineno}" for w in own})


@pytest.mark.parametrize("in_background", [False, True])
def test_a_longer_run(in_background: bool) -> None:
    model = network().to(DEVICE)
    loss_fn, opt = optimizer(model, inverse_in_background=in_background)
    losses = train(model, loss_fn, opt, [*batches(1)] * 40, DEVICE)
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=NEEDS_GPU)])
def test_the_preconditioner(compiled: bool) -> None:
    model, loss_fn = network().to(DEVICE), nn.CrossEntropyLoss()
    own = torch.compile(model) if compiled else model
    adamw = torch.optim.AdamW(model.parameters(), 1e-2)
    preconditioner = KFACPreconditioner(own, loss_fn)
    losses = []
    for x, y in [*batches(1)] * 12:
        adamw.zero_grad()
        loss = loss_fn(own(x.to(DEVICE)), y.to(DEVICE))
        loss.backward()
        preconditioner.step()
        adamw.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]

"""Evaluation between steps costs nothing, whoever does it and however."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights, with_kl_clip
from torch import nn
from torch.optim import swa_utils
from torch.utils.data import DataLoader, TensorDataset

from einconv_kfac import KFAC
from einconv_kfac.optim.replay.environment import Environment

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluation_records_nothing(
    options: dict[str, Any], mode: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    train_step(model, loss_fn, opt, image_batch())
    recorder = opt._preconditioner.recorder

    def fail(*_: Any) -> None:
        raise AssertionError("a forward pass was recorded")

    with monkeypatch.context() as patch, mode():
        patch.setattr(Environment, "now", fail)
        patch.setattr(torch.Tensor, "register_hook", fail)
        for training in (True, False):
            x, y = image_batch(seed=1)
            loss_fn(model.train(training)(x), y)
    assert recorder.is_empty
    train_step(model.train(), loss_fn, opt, image_batch())


@pytest.mark.parametrize("options", MODES)
def test_statistics_of_batch_norm_may_be_updated_between_steps(options: dict[str, Any]) -> None:
    """As ``update_bn`` does for the model itself, or for an average of it."""
    found = []
    batches = DataLoader(TensorDataset(*image_batch(24)), batch_size=6)
    for updated in (False, True):
        model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **options)
        averaged = swa_utils.AveragedModel(model)
        for seed in range(4):
            torch.manual_seed(seed)
            train_step(model, loss_fn, opt, image_batch(seed=seed))
            averaged.update_parameters(model)
            if updated:
                swa_utils.update_bn(batches, model)
                swa_utils.update_bn(batches, averaged)
        found.append(weights(model))
    assert torch.equal(*found)  # statistics of the batch, not running ones, enter the training


@pytest.mark.parametrize("options", MODES)
def test_autocast_with_a_gradient_scaler_and_accumulation(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net().float(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **with_kl_clip(options, 1e-2))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    x, y = image_batch(24)
    losses = []
    for _ in range(12):
        opt.zero_grad()
        total = 0.0
        for rows in (slice(0, 12), slice(12, 24)):
            with torch.autocast("cpu", dtype=torch.float16):
                loss = loss_fn(model(x[rows].float()), y[rows]) / 2
            scaler.scale(loss).backward()
            total += loss.item()
        scaler.step(opt)
        scaler.update()
        losses.append(total)
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("options", MODES)
def test_a_model_that_changes_its_memory_format(options: dict[str, Any]) -> None:
    found = []
    for changes in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **options)
        for seed in range(4):
            x, y = image_batch(seed=seed)
            if changes and seed == 2:
                model.to(memory_format=torch.channels_last)
            train_step(model, loss_fn, opt, (x, y))
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)

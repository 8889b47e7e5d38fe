"""Training as people do it: mixed precision, clipping, copies, other optimizers."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights, with_kl_clip
from torch import nn
from torch.nn.utils import clip_grad_norm_

from einconv_kfac import KFAC, KFACPreconditioner

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


def hooks(*modules: nn.Module) -> int:
    every = [m for module in modules for m in module.modules()]
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in every)


def scaled_training(options: dict[str, Any], *, unscale: bool, steps: int = 4) -> nn.Module:
    """Train with a gradient scaler."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    for seed in range(steps):
        x, y = image_batch(seed=seed)
        opt.zero_grad()
        scaler.scale(loss_fn(model(x), y)).backward()
        if unscale:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
    return model


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("unscale", [False, True])
def test_a_gradient_scaler_changes_nothing(options: dict[str, Any], unscale: bool) -> None:
    plain, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(plain, loss_fn, fisher="exact", **options)
    for seed in range(4):
        train_step(plain, loss_fn, opt, image_batch(seed=seed))
    scaled = scaled_training(options, unscale=unscale)
    torch.testing.assert_close(weights(scaled), weights(plain), **EXACT)


def test_an_overflow_under_a_gradient_scaler_is_skipped_quietly() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, y = image_batch()
    before = weights(model)
    scaler.scale(loss_fn(model(x), y)).backward()
    model[0].weight.grad[0] = float("inf")
    scaler.step(opt)
    scaler.update()
    assert scaler.get_scale() == 2.0**9
    assert torch.equal(before, weights(model))
    assert train_step(model, loss_fn, opt, (x, y)) > train_step(model, loss_fn, opt, (x, y))


@pytest.mark.parametrize("options", MODES)
def test_autocast(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net().float(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **with_kl_clip(options, 1e-2))
    x, y = image_batch(24)
    losses = []
    for _ in range(12):
        opt.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_fn(model(x.float()), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("options", MODES)
def test_clipped_gradients(options: dict[str, Any]) -> None:
    """Fixed rates scale the step as the gradient; the automatic step has a length of its own."""
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    settings = {"momentum": 0.0, "damping": 0.1, "fisher": "exact", **with_kl_clip(options, None)}
    opt = KFAC(model, loss_fn, **settings)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    norm = clip_grad_norm_(model.parameters(), 1e-3)
    before = weights(model)
    opt.step()
    step = weights(model) - before

    other = conv_net()
    train_step(other, loss_fn, KFAC(other, loss_fn, **settings), (x, y))
    factor = 1e-3 / norm if "adaptive" in options else 1.0
    torch.testing.assert_close(step, (weights(other) - before) * factor, rtol=1e-4, atol=0)


@pytest.mark.parametrize("options", MODES)
def test_channels_last(options: dict[str, Any]) -> None:
    batches = [image_batch(seed=s) for s in range(4)]
    models = conv_net(), conv_net().to(memory_format=torch.channels_last)
    loss_fn = nn.CrossEntropyLoss()
    for model in models:
        opt = KFAC(model, loss_fn, **options)
        for x, y in batches:
            layout = torch.channels_last if model is models[1] else torch.contiguous_format
            train_step(model, loss_fn, opt, (x.to(memory_format=layout), y))
    torch.testing.assert_close(*map(weights, models), rtol=1e-6, atol=1e-9)


def test_copies_of_the_model_are_not_recorded() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    copy = deepcopy(model)
    for seed in range(4):
        x, y = image_batch(seed=seed)
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        copy(x)
        averaged(x)
        loss.backward()
        opt.step()
        averaged.update_parameters(model)
    alone = conv_net()
    opt = KFAC(alone, loss_fn)
    for seed in range(4):
        train_step(alone, loss_fn, opt, image_batch(seed=seed))
    torch.testing.assert_close(weights(model), weights(alone), **EXACT)


def test_a_lost_optimizer_leaves_no_hooks_and_no_memory() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    reference = weakref.ref(opt)
    del opt
    gc.collect()
    assert reference() is None
    assert hooks(model, loss_fn) == 0


def test_removed_hooks_are_gone() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    assert hooks(model, loss_fn) > 0
    opt.remove_hooks()
    assert hooks(model, loss_fn) == 0


def test_steps_leave_no_graph_and_no_hooks_behind() -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)

    def alive() -> tuple[int, int]:
        opt._step._trust.drop_()  # it notes a direction on some steps only
        gc.collect()
        tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
        return len(tensors), hooks(model, loss_fn)

    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    tensors, registered = alive()
    for seed in range(11):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    now, remaining = alive()
    assert now <= tensors
    assert remaining == registered


@pytest.mark.parametrize("schedule", [1, lambda step: 2 if step else 1])
def test_hyper_parameters_may_be_functions_of_the_step(schedule: Any) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(
        model,
        loss_fn,
        lr=0.1,
        adaptive=False,
        damping=lambda step: 0.1 / (1 + step),
        factor_decay=lambda step: 0.5,
        factor_update_period=schedule,
        inverse_update_period=schedule,
        kl_clip=lambda step: 1e-2,
    )
    for _ in range(3):
        train_step(model, loss_fn, opt, image_batch())
    assert opt.statistics()["damping"] == pytest.approx(0.1 / 3)


def test_statistics_of_an_automatic_step() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    found = opt.statistics()
    chosen = {"damping", "step_size", "momentum", "trust", "gain"}
    assert found.keys() == chosen | {"predicted", "ratio", "cholesky_retries"}
    assert found["predicted"] < 0 < found["step_size"]


class TestPreconditioner:
    def test_sgd_behind_it_is_kfac_with_fixed_rates(self) -> None:
        batches = [image_batch(seed=s) for s in range(5)]
        loss_fn = nn.CrossEntropyLoss()
        model = conv_net()
        opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, damping=0.1, kl_clip=None, momentum=0.5)
        for batch in batches:
            train_step(model, loss_fn, opt, batch)

        other, loss_fn = conv_net(), nn.CrossEntropyLoss()
        preconditioner = KFACPreconditioner(other, loss_fn, damping=0.1)
        sgd = torch.optim.SGD(other.parameters(), lr=0.1, momentum=0.5)
        for x, y in batches:
            sgd.zero_grad()
            loss_fn(other(x), y).backward()
            preconditioner.step()
            sgd.step()
        torch.testing.assert_close(weights(model), weights(other), **EXACT)

    def test_resumes(self) -> None:
        loss_fn = nn.CrossEntropyLoss()
        model = conv_net()
        preconditioner = KFACPreconditioner(model, loss_fn)
        x, y = image_batch()
        loss_fn(model(x), y).backward()
        preconditioner.step()
        copy = conv_net()
        other = KFACPreconditioner(copy, loss_fn, seed=5)
        other.load_state_dict(preconditioner.state_dict())
        for m, p in ((model, preconditioner), (copy, other)):
            m.zero_grad()
            loss_fn(m(x), y).backward()
            p.step()
        for a, b in zip(model.parameters(), copy.parameters()):
            assert torch.equal(a.grad, b.grad)

    def test_gradients_that_are_not_finite_stay(self) -> None:
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        preconditioner = KFACPreconditioner(model, loss_fn)
        x, y = image_batch()
        loss_fn(model(x), y).backward()
        model[0].weight.grad[0] = float("nan")
        before = model[2].weight.grad.clone()
        with pytest.warns(RuntimeWarning, match=r"^The gradient of '0\.weight' was not finite"):
            preconditioner.step()
        assert torch.equal(before, model[2].weight.grad)
        assert preconditioner.steps == 0

"""KFAC as any torch optimizer: schedulers, averaging, hooks, copies, groups, other dtypes."""

from __future__ import annotations

import pickle
from copy import deepcopy
from itertools import cycle
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights, with_kl_clip
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from einconv_kfac import KFAC, KFACPreconditioner

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
INVERSES: list[dict[str, Any]] = [
    {"inverse": "exact"},
    {"inverse": "ekfac", "inverse_in_background": True},
    {"lr": 0.1, "adaptive": False, "inverse": "ekfac", "damping": 0.3},
]
SCHEDULERS: dict[str, Any] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2, cycle_momentum=False),
    "CyclicLR-momentum": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8, cycle_momentum=False),
    "OneCycleLR-momentum": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 8),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, anneal_epochs=3),
}


def small_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()


@pytest.mark.filterwarnings("ignore:The epoch parameter in .scheduler.step")  # SequentialLR's own
@pytest.mark.parametrize(("name", "options"), list(zip(SCHEDULERS, cycle(MODES))))
def test_schedulers_set_what_they_set_for_sgd(name: str, options: dict[str, Any]) -> None:
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="forward-only", **options)
    twin = torch.optim.SGD(small_net().parameters(), lr=options.get("lr", 1.0), momentum=0.9)
    schedulers = [SCHEDULERS[name](o) for o in (opt, twin)]
    for step in range(6):
        before = weights(model)
        train_step(model, loss_fn, opt, image_batch(seed=step))
        assert torch.equal(before, weights(model)) == (opt.param_groups[0]["lr"] == 0)
        twin.step()
        for scheduler in schedulers:
            scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        for key in ("lr", *(["momentum"] if name.endswith("momentum") else [])):
            assert opt.param_groups[0][key] == pytest.approx(twin.param_groups[0][key]), key
    resumed = SCHEDULERS[name](KFAC(small_net(), loss_fn, **options))
    resumed.load_state_dict(schedulers[0].state_dict())


def test_every_scheduler_of_torch_is_in_the_table() -> None:
    assert set(lr_scheduler.__all__) - {"LRScheduler"} <= {n.split("-")[0] for n in SCHEDULERS}


@pytest.mark.parametrize("options", MODES)
def test_weight_averaging(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    averaged, seen = swa_utils.AveragedModel(model), []
    for seed in range(4):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        averaged.update_parameters(model)
        seen.append(weights(model))
    torch.testing.assert_close(weights(averaged), torch.stack(seen).mean(0), **EXACT)
    swa_utils.update_bn([image_batch(seed=seed)[0] for seed in range(3)], averaged)
    assert averaged.module[1].num_batches_tracked == 3
    assert model[1].num_batches_tracked == 4


@pytest.mark.parametrize(
    ("options", "way"),
    [*zip([*MODES, *INVERSES], cycle(["deepcopy", "pickle"])), (MODES[0], "pickle")],
)
def test_a_copy_goes_on_as_the_original(options: dict[str, Any], way: str) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    groups = [{"params": model[0].parameters(), "lr": 0.05}, {"params": model[5].parameters()}]
    opt = KFAC(model, loss_fn, params=groups, weight_decay=1e-3, **options)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    whole = (model, loss_fn, opt)
    copies = deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    assert copies[2].param_groups[0]["params"][0] is copies[0][0].weight
    for seed in range(3, 6):
        for net, loss, optimizer in (whole, copies):
            train_step(net, loss, optimizer, image_batch(seed=seed))
    assert torch.equal(weights(model), weights(copies[0]))


@pytest.mark.parametrize("inverse", ["factored", "exact", "ekfac"])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_of_a_preconditioner(way: str, inverse: Any) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    whole = (model, loss_fn, KFACPreconditioner(model, loss_fn, inverse=inverse))
    copies = whole
    for _ in range(2):
        for net, loss, machine in dict.fromkeys((whole, copies)):
            net.zero_grad()
            loss(net(image_batch()[0]), image_batch()[1]).backward()
            machine.step()
        if copies is whole:
            copies = deepcopy(whole) if way == "deepcopy" else pickle.loads(pickle.dumps(whole))
    for a, b in zip(model.parameters(), copies[0].parameters()):
        assert torch.equal(a.grad, b.grad)


def test_a_copied_model_records_nothing_and_trains_with_an_optimizer_of_its_own() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    model, loss_fn = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3)), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for copy in (deepcopy(model), pickle.loads(pickle.dumps(model))):
        own = KFAC(copy, loss_fn)
        batch = torch.randn(16, 3, 8), torch.randint(3, (16,))
        losses = [train_step(copy, loss_fn, own, batch) for _ in range(6)]
        assert losses[-1] < losses[0]
    assert opt.state_dict()["kfac"]["preconditioner"]["layers"]["2"]["updates"] == 0


@pytest.mark.parametrize("options", [*MODES, *INVERSES])
@pytest.mark.parametrize("steps", [0, 3])
def test_a_model_that_changes_its_dtype(options: dict[str, Any], steps: int) -> None:
    model, loss_fn = conv_net(random_layers=True).float(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **with_kl_clip(options, 1e-1))
    batches = [image_batch(24, seed=seed % 2) for seed in range(10)]
    losses = [train_step(model, loss_fn, opt, (x.float(), y)) for x, y in batches[:steps]]
    model.double()
    losses += [train_step(model, loss_fn, opt, batch) for batch in batches[steps:]]
    assert weights(model).dtype == torch.float64
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", MODES)
def test_bfloat16_models(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net().bfloat16(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **with_kl_clip(options, 1e-1))
    x, y = image_batch(24)
    losses = [train_step(model, loss_fn, opt, (x.bfloat16(), y)) for _ in range(8)]
    assert losses[-1] < 0.6 * losses[0]
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


@pytest.mark.parametrize("options", MODES)
def test_clipping_past_autograd_is_clipping(options: dict[str, Any]) -> None:
    ends = []
    for is_past in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, fisher="exact", **options)
        for seed in range(3):
            opt.zero_grad()
            x, y = image_batch(seed=seed)
            loss_fn(model(x), y).backward()
            for p in model.parameters():
                assert p.grad is not None
                (p.grad.data if is_past else p.grad).mul_(0.1)
            opt.step()
        ends.append(weights(model))
    torch.testing.assert_close(*ends, **EXACT)


@pytest.mark.parametrize("options", MODES)
def test_models_that_share_a_loss_do_not_disturb_each_other(options: dict[str, Any]) -> None:
    alone, loss_fn = [conv_net(seed=s) for s in (0, 1)], nn.CrossEntropyLoss()
    for model in alone:
        own = nn.CrossEntropyLoss()
        opt = KFAC(model, own, fisher="exact", **options)
        for seed in range(3):
            train_step(model, own, opt, image_batch(seed=seed))
    models = [conv_net(seed=s) for s in (0, 1)]
    opts = [KFAC(model, loss_fn, fisher="exact", **options) for model in models]
    for seed in range(3):
        x, y = image_batch(seed=seed)
        outputs = [model(x) for model in models]
        for opt in opts:
            opt.zero_grad()
        sum(loss_fn(output, y) for output in outputs).backward()
        for opt in opts:
            opt.step()
    for model, other in zip(models, alone):
        torch.testing.assert_close(weights(model), weights(other), **EXACT)


@pytest.mark.parametrize("options", MODES)
def test_step_hooks_run_and_are_removed(options: dict[str, Any]) -> None:
    model, loss_fn, seen = conv_net(), nn.CrossEntropyLoss(), []
    opt = KFAC(model, loss_fn, **options)
    handles = [
        opt.register_step_pre_hook(lambda *_: seen.append("before")),
        opt.register_step_post_hook(lambda *_: seen.append("after")),
    ]
    train_step(model, loss_fn, opt, image_batch())
    for handle in handles:
        handle.remove()
    train_step(model, loss_fn, opt, image_batch())
    assert seen == ["before", "after"]


@pytest.mark.parametrize("options", MODES)
def test_state_dict_hooks_and_round_trip(options: dict[str, Any]) -> None:
    model, loss_fn, seen = conv_net(), nn.CrossEntropyLoss(), []
    opt = KFAC(model, loss_fn, **options)
    train_step(model, loss_fn, opt, image_batch())
    opt.register_load_state_dict_post_hook(lambda _: seen.append("loaded"))
    state = deepcopy(opt.state_dict())
    opt.load_state_dict(state)
    opt.load_state_dict(state)  # loading leaves what was loaded alone
    assert seen == ["loaded"] * 2
    twice = opt.state_dict()
    assert twice["param_groups"] == state["param_groups"]
    assert_same(twice["state"], state["state"])
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        opt.load_state_dict(
            {**state, "param_groups": [{**state["param_groups"][0], "params": [0]}]}
        )


@pytest.mark.parametrize("options", MODES)
def test_zero_grad_and_repr(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    train_step(model, loss_fn, opt, image_batch())
    opt.zero_grad(set_to_none=False)
    assert all((p.grad == 0).all() for p in model.parameters())
    opt.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    before = weights(model)
    assert repr(opt).startswith("KFAC (\nParameter Group 0")
    opt.step()  # without gradients there is nothing to do
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("options", MODES)
def test_statistics_are_logged_after_each_step(options: dict[str, Any]) -> None:
    model, loss_fn, seen = conv_net(), nn.CrossEntropyLoss(), []
    opt = KFAC(model, loss_fn, log_to=lambda step, found: seen.append((step, found)), **options)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        assert seen[-1] == (seed, opt.statistics())
    x, y = image_batch()
    with pytest.warns(RuntimeWarning, match="skipped"):
        train_step(model, loss_fn, opt, (x * float("nan"), y))
    assert [step for step, _ in seen] == [0, 1, 2]


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        (lambda m: m[0].weight, TypeError, "should be an iterable of Tensors or dicts"),
        (lambda m: [m[0].weight, 1.0], TypeError, "optimizer can only optimize Tensors"),
        (
            lambda m: [{"params": [m[0].weight]}, {"params": [m[0].weight]}],
            ValueError,
            "some parameters appear in more than one parameter group",
        ),
    ],
)
def test_wrong_parameters_are_refused_as_torch_does(
    params: Any, error: type[Exception], message: str
) -> None:
    model = conv_net()
    with pytest.raises(error, match=message):
        KFAC(model, nn.CrossEntropyLoss(), params=params(model))
    assert not any(m._forward_hooks for m in model.modules())

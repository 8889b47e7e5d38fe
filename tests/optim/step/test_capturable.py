"""Steps that CUDA graphs may capture, on the processor: they are those of fixed rates."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from einconv_kfac import KFAC

FIXED = {"adaptive": False, "fisher": "exact"}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"nesterov": True, "momentum": 0.7, "weight_decay": 1e-2},
    {"decoupled_weight_decay": True, "weight_decay": 0.1, "max_step_norm": 0.05},
    {"kl_clip": None, "momentum": 0.0, "maximize": True},
    {"exclude": ["0"], "inverse": "exact"},
    {"exclude": ["0"], "fallback": "adam", "weight_decay": 1e-2},
]
SEEDS = range(6)


def model_of() -> tuple[nn.Module, nn.Module]:
    return conv_net().double(), nn.CrossEntropyLoss()


def trained(
    lr: Any, steps: int = 6, schedule: bool = False, **options: Any
) -> tuple[nn.Module, nn.Module, KFAC]:
    model, loss_fn = model_of()
    opt = KFAC(model, loss_fn, lr=lr, **{**FIXED, **options})
    state = opt.state_dict()
    state["kfac"]["preconditioner"]["steps"] = 1000  # when most steps are ordinary ones
    opt.load_state_dict(state)
    scheduler = LinearLR(opt, 1.0, 0.1, total_iters=steps) if schedule else None
    for seed in range(steps):
        x, y = image_batch(seed=seed)
        train_step(model, loss_fn, opt, (x.double(), y))
        if scheduler is not None:
            scheduler.step()
    return model, loss_fn, opt


IN_TURN = [
    (options, as_tensor, (index + as_tensor) % 2 == 1)
    for index, options in enumerate(OPTIONS)
    for as_tensor in (False, True)
]
"""Each option with rates of both kinds, one of which follows a schedule."""


@pytest.mark.parametrize(("options", "as_tensor", "schedule"), IN_TURN)
def test_steps_are_those_of_fixed_rates(
    options: dict[str, Any], as_tensor: bool, schedule: bool
) -> None:
    own, _, plain = trained(0.05, schedule=schedule, **options)
    lr = torch.tensor(0.05, dtype=torch.float64) if as_tensor else 0.05
    other, _, opt = trained(lr, schedule=schedule, capturable=True, **options)
    for p, q in zip(own.parameters(), other.parameters()):
        torch.testing.assert_close(q, p, rtol=1e-10, atol=1e-12)
    assert isinstance(opt.param_groups[0]["lr"], torch.Tensor) == as_tensor
    found, expected = opt.statistics(), plain.statistics()
    assert found == pytest.approx(expected, rel=1e-9)
    norms = opt.layer_statistics()
    for name, numbers in plain.layer_statistics().items():
        assert norms[name]["update_norm"] == pytest.approx(numbers["update_norm"], rel=1e-9)


def test_groups_may_have_rates_of_their_own() -> None:
    results = []
    for kind in (float, torch.tensor):
        model, loss_fn = model_of()
        first, *others = model.parameters()
        groups = [{"params": [first], "lr": kind(0.01)}, {"params": others}]
        is_tensor = kind is not float
        opt = KFAC(model, loss_fn, lr=0.1, params=groups, capturable=is_tensor, **FIXED)
        for seed in SEEDS:
            x, y = image_batch(seed=seed)
            train_step(model, loss_fn, opt, (x.double(), y))
        results.append([*model.parameters()])
    for own, other in zip(*results):
        torch.testing.assert_close(other, own, rtol=1e-6, atol=1e-8)  # 0.01 is in float32


def copied(
    model: nn.Module, loss_fn: nn.Module, opt: KFAC, how: str, **options: Any
) -> tuple[Any, Any, Any]:
    if how == "pickle":
        found: tuple[Any, Any, Any] = pickle.loads(pickle.dumps((model, loss_fn, opt)))
        return found
    if how == "deepcopy":
        return copy.deepcopy((model, loss_fn, opt))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    again, other = copy.deepcopy(model), nn.CrossEntropyLoss()
    made = KFAC(again, other, lr=torch.tensor(9.0), capturable=True, **FIXED, **options)
    made.load_state_dict(torch.load(file, weights_only=True))
    return again, other, made


ADAM = {"exclude": ["0"], "fallback": "adam"}


@pytest.mark.parametrize("options", [{}, ADAM])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict"])
def test_copies_go_on_as_the_original(how: str, options: dict[str, Any]) -> None:
    own = trained(torch.tensor(0.05, dtype=torch.float64), capturable=True, **options)
    other = copied(*own, how, **options)
    assert torch.equal(other[2].param_groups[0]["lr"], own[2].param_groups[0]["lr"])
    assert other[2].param_groups[0]["lr"] is not own[2].param_groups[0]["lr"]
    for model, loss_fn, opt in (own, other):
        for seed in SEEDS:
            x, y = image_batch(seed=seed + 20)
            train_step(model, loss_fn, opt, (x.double(), y))
    assert all(map(torch.equal, own[0].parameters(), other[0].parameters()))


def test_a_step_that_is_not_finite_is_left_out_and_counts() -> None:
    model, loss_fn, opt = trained(0.05, capturable=True)
    before = [p.detach().clone() for p in model.parameters()]
    assert opt.can_replay()
    x, y = image_batch(seed=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_fn(model(x.double()), y).mul(float("nan")).backward()
        opt.step()
    assert all(map(torch.equal, before, model.parameters()))
    assert opt.state_dict()["kfac"]["preconditioner"]["steps"] == 1007


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_averages_of_a_step_that_is_not_finite_stay(value: float) -> None:
    model, loss_fn, opt = trained(0.05, capturable=True, **ADAM)
    owned = [own for own in opt.state.values() if "exp_avg" in own]
    tensors = [own[key] for own in owned for key in ("step", "exp_avg", "exp_avg_sq")]
    before = [tensor.clone() for tensor in tensors]
    x, y = image_batch(seed=0)
    loss_fn(model(x.double()), y).mul(value).backward()
    opt.step()
    assert all(map(torch.equal, before, tensors))
    train_step(model, loss_fn, opt, (x.double(), y))
    assert [int(own["step"]) for own in owned] == [7] * len(owned)
    assert all(own["exp_avg"] is tensor for own, tensor in zip(owned, tensors[1::3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("from_capturable", [False, True])
def test_states_load_in_the_other_mode(dtype: torch.dtype, from_capturable: bool) -> None:
    """A count of steps is a number or a tensor, and training goes on in the same way."""
    results = []
    for changes in (False, True):
        model, loss_fn = conv_net().to(dtype), nn.CrossEntropyLoss()
        given = {"lr": 0.05, **FIXED, **ADAM}
        opt = KFAC(model, loss_fn, capturable=from_capturable, **given)
        for seed in range(8):
            if changes and seed == 4:
                saved = opt.state_dict()
                opt = KFAC(model, loss_fn, capturable=not from_capturable, **given)
                opt.load_state_dict(saved)
            x, y = image_batch(seed=seed)
            train_step(model, loss_fn, opt, (x.to(dtype), y))
        results.append([p.detach() for p in model.parameters()])
        counts = [own["step"] for own in opt.state.values() if "step" in own]
        assert len(counts) == 2
        for count in counts:
            assert count == 8
            assert isinstance(count, torch.Tensor) == (from_capturable != changes)
            if isinstance(count, torch.Tensor):
                assert (count.dtype, count.shape) == (torch.float32, ())
    for own, other in zip(*results):
        torch.testing.assert_close(other, own)


@pytest.mark.parametrize("capturable", [False, True])
def test_a_loaded_state_has_memory_of_its_own(capturable: bool) -> None:
    own = trained(0.05, capturable=True, **ADAM)
    model, loss_fn = copy.deepcopy(own[:2])
    opt = KFAC(model, loss_fn, lr=0.05, capturable=capturable, **FIXED, **ADAM)
    opt.load_state_dict(own[2].state_dict())
    before = copy.deepcopy([*opt.state.values()])
    x, y = image_batch(seed=20)
    train_step(*own, (x.double(), y))
    for state, known in zip(opt.state.values(), before):
        assert all(torch.equal(*map(torch.as_tensor, (state[key], known[key]))) for key in known)


@pytest.mark.parametrize("count", [-1.0, 0.5, float("nan"), float("inf")])
def test_counts_that_cannot_be_are_refused(count: float) -> None:
    _, _, opt = trained(0.05, capturable=True, **ADAM)
    state = opt.state_dict()
    next(own for own in state["state"].values() if "step" in own)["step"] = torch.tensor(count)
    with pytest.raises(ValueError, match="an integer that is not negative, or a"):
        opt.load_state_dict(state)


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
def test_parameters_without_factors_are_trained_as_by_torch(weight_decay: float) -> None:
    model, loss_fn = model_of()
    other = copy.deepcopy(model)
    given = {"exclude": [type(m) for m in model], "fallback": "adam", "capturable": True}
    opt = KFAC(model, loss_fn, lr=0.01, weight_decay=weight_decay, **FIXED, **given)
    adam = torch.optim.Adam(other.parameters(), lr=0.01, weight_decay=weight_decay)
    for seed in range(30):
        x, y = image_batch(seed=seed)
        train_step(model, loss_fn, opt, (x.double(), y))
        adam.zero_grad()
        loss_fn(other(x.double()), y).backward()
        adam.step()
    for p, q in zip(model.parameters(), other.parameters()):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class Replayed:
    """Stands for a graph."""

    count = 0

    def replay(self) -> None:
        self.count += 1


def test_replays_count_as_steps() -> None:
    """So that factors are updated every tenth step, as without replays."""
    model, loss_fn, opt = trained(0.05, steps=1, capturable=True)
    graph, taken = Replayed(), []
    for number in range(1, 25):
        if opt.replay(graph):
            continue
        x, y = image_batch(seed=number)
        train_step(model, loss_fn, opt, (x.double(), y))
        taken.append(number)
    assert taken == [10, 20]
    assert graph.count == 22
    assert opt.state_dict()["kfac"]["preconditioner"]["steps"] == 1025


def test_only_capturable_steps_are_replayed() -> None:
    _, _, opt = trained(0.05)
    graph = Replayed()
    assert not opt.can_replay()
    assert not opt.replay(graph)
    assert not graph.count


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"adaptive": True}, "`capturable` must be False when adaptive=True, got True"),
        ({"damping": lambda step: 0.1}, "`damping` must be a number when capturable=True"),
        ({"momentum": lambda step: 0.1}, "`momentum` must be a number when capturable=True"),
        ({"kl_clip": lambda step: 0.1}, "`kl_clip` must be a number when capturable=True"),
        ({"inverse_in_background": True}, "`inverse_in_background` must be False when capturable"),
        ({"capturable": 1.5}, "`capturable` must be"),
        ({"lr": torch.tensor(-0.1)}, "`lr` must be a number"),
        ({"lr": torch.ones(2)}, "`lr` must be a number"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], match: str) -> None:
    model, loss_fn = model_of()
    hooks = sum(len(module._forward_hooks) for module in model.modules())
    with pytest.raises(ValueError, match=match):
        KFAC(model, loss_fn, **{"lr": 0.1, "capturable": True, **FIXED, **options})
    assert hooks == sum(len(module._forward_hooks) for module in model.modules())

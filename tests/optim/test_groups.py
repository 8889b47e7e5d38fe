"""KFAC: parameter groups, exclusion, fallbacks, and parameters that come and go."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
FIXED: dict[str, Any] = {"adaptive": False, "fisher": "exact", "kl_clip": None, "momentum": 0.0}


def dense_step(x: Tensor, g: Tensor, gradient: Tensor, damping: float) -> Tensor:
    """Solve with ``B (x) A`` and factored damping, from dense matrices."""
    a, b = x.T @ x / len(x), g.T @ g / len(g)
    pi = ((a.trace() / len(a)) / (b.trace() / len(b))).sqrt()
    eyes = torch.eye(len(b)).double(), torch.eye(len(a)).double()
    root = damping**0.5
    damped = torch.kron(b + root / pi * eyes[0], a + pi * root * eyes[1])
    return torch.linalg.solve(damped, gradient.flatten()).reshape(gradient.shape)


def test_a_group_has_its_own_damping_rate_and_decay() -> None:
    """Two linear layers side by side: each step is the dense definition with its own numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 2, bias=False))
    model, loss_fn = model.double(), nn.MSELoss()
    x, y = torch.randn(9, 4).double(), torch.randn(9, 2).double()
    groups = [
        {"params": model[0].parameters(), "damping": 0.5, "lr": 0.3},
        {"params": model[2].parameters(), "weight_decay": 0.1},
    ]
    opt = KFAC(
        model, loss_fn, lr=0.2, params=groups, damping=0.05, **{**FIXED, "fisher": "empirical"}
    )
    before = [model[0].weight.detach().clone(), model[2].weight.detach().clone()]
    hidden = (x @ before[0].T).tanh()
    at_output = 2 * (hidden @ before[1].T - y) / 2  # the mean over two outputs
    inner = at_output @ before[1] * (1 - hidden**2)
    train_step(model, loss_fn, opt, (x, y))
    first = dense_step(x, inner, inner.T @ x / 9, 0.5)
    second = dense_step(hidden, at_output, at_output.T @ hidden / 9 + 0.1 * before[1], 0.15)
    torch.testing.assert_close(model[0].weight.detach(), before[0] - 0.3 * first, **EXACT)
    torch.testing.assert_close(model[2].weight.detach(), before[1] - 0.2 * second, **EXACT)


@pytest.mark.parametrize("options", MODES)
def test_groups_that_set_nothing_take_the_optimizers_settings(options: dict[str, Any]) -> None:
    shared = {"factor_decay": 0.5, "factor_update_period": 2, "inverse_update_period": 3}
    results = []
    for grouped in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        parts = [model[0], model[2], model[5]]
        own = {**shared} if grouped else {}
        groups = [{"params": part.parameters(), **own} for part in parts]
        opt = KFAC(model, loss_fn, params=groups, **({} if grouped else shared), **options)
        for seed in range(25):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        results.append(weights(model))
    assert torch.equal(*results)


def test_periods_of_a_group_hold_for_its_layers() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    groups = [
        {"params": model[0].parameters(), "factor_update_period": 1},
        {"params": [*model[2].parameters(), *model[5].parameters()]},
    ]
    opt = KFAC(model, loss_fn, params=groups, factor_update_period=5)
    for _ in range(60):
        train_step(model, loss_fn, opt, image_batch(4))
    layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
    assert layers["0"]["updates"] == 60
    assert layers["2"]["updates"] == layers["5"]["updates"] < 40


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"damping": 0.0}, "`damping` must be a number"),
        ({"factor_decay": 1.0}, "`factor_decay` must be a number"),
        ({"momentum": -0.1}, "`momentum` must be a number"),
        ({"inverse_update_period": 0}, "`inverse_update_period` must be a positive integer, got 0"),
    ],
)
def test_bad_groups_are_refused(group: dict[str, Any], message: str) -> None:
    model = conv_net()
    with pytest.raises(ValueError, match=message):
        KFAC(model, nn.CrossEntropyLoss(), params=[{"params": model.parameters(), **group}])


def test_momenta_that_differ_have_no_quadratic_model() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, params=[{"params": m.parameters()} for m in (model[0], model[2])])
    opt.param_groups[0]["momentum"] = 0.5
    with pytest.raises(ValueError, match="`momentum` must be the same in every parameter group"):
        train_step(model, loss_fn, opt, image_batch())


@pytest.mark.parametrize("exclude", ["2", "[2]", ["2"]])
def test_excluded_layers_take_the_fallback(exclude: Any) -> None:
    model = conv_net()
    coverage = KFAC(model, nn.CrossEntropyLoss(), exclude=exclude).coverage()
    assert {name for name, kind in coverage.items() if kind == "adam"} == {"2.weight", "2.bias"}


def test_excluded_modules_contain_their_children() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.Linear(2, 2))
    kinds = KFAC(model, nn.MSELoss(), exclude=model[0], fallback="gradient").coverage()
    assert [kinds[f"{name}.weight"] for name in ("0.0", "0.1", "1")] == ["gradient"] * 2 + ["kfac"]
    machine = KFACPreconditioner(model, nn.MSELoss(), exclude="0.*")
    assert machine.covered() == {"1.weight", "1.bias"}


@pytest.mark.parametrize("exclude", ["encoder.*", nn.Linear(2, 2)])
def test_an_exclusion_that_matches_nothing_is_refused(exclude: Any) -> None:
    with pytest.raises(ValueError, match="`exclude` must name modules of `model`, got"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), exclude=exclude)


@pytest.mark.parametrize("kind", ["adam", "gradient"])
def test_fixed_fallback_is_torchs(kind: Any) -> None:
    """Without a layer that is preconditioned, what remains is torch's own optimizer."""
    model, other, loss_fn = conv_net(), conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, lr=0.01, adaptive=False, fallback=kind, exclude=["0", "2", "5"])
    reference: torch.optim.Optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    if kind == "gradient":
        reference = torch.optim.SGD(other.parameters(), lr=0.01, momentum=0.9)
    for seed in range(6):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        train_step(other, loss_fn, reference, image_batch(seed=seed))
    torch.testing.assert_close(weights(model), weights(other), **EXACT)


def test_an_unknown_fallback_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`fallback` must be one of .*, got 'sgd'"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), fallback="sgd")  # type: ignore[arg-type]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("added", [False, True])
def test_parameters_unfrozen_later_are_trained(options: dict[str, Any], added: bool) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    first = list(model[0].parameters())
    model[0].requires_grad_(False)
    opt = KFAC(model, loss_fn, params=None if added else model.parameters(), **options)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert opt.coverage()["0.weight"] == "frozen"
    before = first[0].detach().clone()
    model[0].requires_grad_(True)
    if added:
        opt.add_param_group({"params": first})
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert not torch.equal(before, first[0])
    assert opt.coverage()["0.weight"] == "kfac"
    assert opt.state_dict()["kfac"]["preconditioner"]["layers"]["0"]["updates"] >= 2


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("copied", [False, True])
def test_unfrozen_parameters_join_an_optimizer_of_the_whole_model(
    options: dict[str, Any], copied: bool
) -> None:
    """As if all parameters of the model had been given, which torch's optimizers need."""
    results = []
    for is_given in (True, False):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        model[2].requires_grad_(False)
        opt = KFAC(model, loss_fn, params=model.parameters() if is_given else None, **options)
        for seed in range(3):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        if copied:
            model, loss_fn, opt = copy.deepcopy((model, loss_fn, opt))
        model.requires_grad_(True)
        joins = nullcontext() if is_given else pytest.warns(UserWarning, match=r"\['2.weight', ")
        with joins:
            train_step(model, loss_fn, opt, image_batch(seed=3))
        train_step(model, loss_fn, opt, image_batch(seed=4))
        results.append(weights(model))
        assert len(opt.param_groups) == 1
        assert set(opt.coverage().values()) == {"kfac"}

        again = conv_net()
        new = KFAC(again, loss_fn, **options)
        again.load_state_dict(model.state_dict())
        new.load_state_dict(opt.state_dict())
        for one, other in ((model, opt), (again, new)):
            train_step(one, loss_fn, other, image_batch(seed=5))
        assert torch.equal(weights(model), weights(again))
    assert torch.equal(*results)


@pytest.mark.parametrize("options", MODES)
def test_unfrozen_parameters_stay_with_params_of_others(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    opt = KFAC(model, loss_fn, params=[p for p in model.parameters() if p.requires_grad], **options)
    before = model[0].weight.detach().clone()
    model.requires_grad_(True)
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    assert torch.equal(before, model[0].weight)
    assert opt.coverage()["0.weight"] == "left out"


@pytest.mark.parametrize("options", MODES)
def test_parameters_that_the_loss_does_not_reach_stay(options: dict[str, Any]) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.never = conv_net(), nn.Linear(2, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    model, loss_fn = Unused(), nn.CrossEntropyLoss()
    before = model.never.weight.detach().clone()
    opt = KFAC(model, loss_fn, **options)
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(4)]
    assert torch.equal(before, model.never.weight)
    assert losses[-1] < losses[0]


def test_attention_trains() -> None:
    """Its fused implementations have no forward mode."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
    model = nn.Sequential(layer, nn.Flatten(), nn.Linear(24, 3))
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    batch = torch.randn(16, 3, 8), torch.randint(3, (16,))
    losses = [train_step(model, loss_fn, opt, batch) for _ in range(8)]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("options", MODES)
def test_a_group_that_is_added_before_the_first_step(options: dict[str, Any]) -> None:
    """It is the same as one that was given at first: its layers have factors at once."""
    results = []
    for added in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        groups = [{"params": model[0].parameters()}, {"params": [*model[2:].parameters()]}]
        opt = KFAC(model, loss_fn, params=groups[:1] if added else groups, **options)
        for group in groups[1:] if added else []:
            opt.add_param_group(group)
        for seed in range(3):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        results.append(weights(model))
    assert torch.equal(*results)

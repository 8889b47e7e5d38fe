"""Every argument of every constructor, with wrong types and values: refused by name or harmless."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.optim import LevenbergMarquardt
from einconv_kfac.optim.hyperparameters import Hyperparameters

HUGE = 2**70
NUMBERS = (0, 0.0, 1, -1, 0.5, 1.5, -0.5, HUGE, 1e400, float("nan"))
ODD: list[Any] = [
    *NUMBERS,
    None,
    True,
    "a",
    "",
    b"a",
    [],
    [[]],
    {},
    [3],
    (1, 2),
    1j,
    object(),
    int,
    dict,
    len,
    torch.zeros(2),
    torch.tensor(0.5),
    torch.tensor(1),
    torch.tensor(True),
    torch.tensor(1j),
    torch.tensor(1.0, device="meta"),
    np.float32(0.5),
    np.int64(1),
    np.zeros(2),
    np.array(["a", "b"]),
    Fraction(1, 2),
    nn.Linear(2, 2),
    nn.CrossEntropyLoss,
    lambda: 0.1,
    lambda step: None,
    lambda step: "a",
    lambda step: 0.5,
    lambda step: 1 / 0,
]
FIXED = {"lr": 0.1, "adaptive": False}


def refusal(error: Exception, name: str, value: Any) -> None:
    """Check that an error names the argument."""
    found = f"`{name}`" in str(error) or (name == "params" and "param" in str(error))
    assert found, f"{name}={value!r}: {error}"


def arguments(made: Callable[..., Any]) -> list[str]:
    """The arguments of a constructor."""
    return [name for name in inspect.signature(made).parameters if name not in ("self", "args")]


CASES = [
    *((KFAC, mode, name) for mode in ({}, FIXED) for name in arguments(KFAC)),
    *((KFACPreconditioner, {}, name) for name in arguments(KFACPreconditioner)),
]


def small_net() -> nn.Module:
    """Return a network of two layers, for steps that are many."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()


def small_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Return random inputs with random classes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (6,), generator=generator)


@pytest.mark.parametrize(("made", "mode", "name"), CASES)
def test_wrong_arguments_are_refused_by_name_or_harmless(
    made: Callable[..., Any], mode: dict[str, Any], name: str
) -> None:
    refused_late: list[Any] = []
    model, loss_fn = small_net(), nn.CrossEntropyLoss()
    for index, value in enumerate(ODD):
        if name == "loss_fn" and value is None:
            continue  # losses that the model returns
        if name == "mc_samples" and value is HUGE:
            continue  # it is taken at its word
        options = {"model": model, "loss_fn": loss_fn, **mode, name: value}
        try:
            opt = made(**options)
        except (ValueError, TypeError) as error:
            refusal(error, name, value)
            modules = [*model.modules(), loss_fn]
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
            continue
        own, own_loss = model, loss_fn
        model, loss_fn = small_net(), nn.CrossEntropyLoss()  # of what is refused next
        if name in ("log_to", "model", "loss_fn"):
            continue  # a function's errors are its own, and it may be another model
        if made is KFAC and bool(index % 2) == bool(mode):
            continue  # the other mode takes steps with it
        x, y = small_batch()
        for _ in range(2):
            own.zero_grad()
            own_loss(own(x), y).backward()
            try:
                opt.step()
            except (ValueError, TypeError) as error:  # of a function that fails later
                refused_late.append(value)
                refusal(error, name, value)
        assert value is HUGE or weights(own).isfinite().all(), f"{name}={value!r}"
    assert all(callable(value) for value in refused_late)


@pytest.mark.parametrize("name", arguments(Hyperparameters))
def test_wrong_hyperparameters_are_refused_by_name(name: str) -> None:
    for value in ODD:
        try:
            Hyperparameters(**{name: value})
        except ValueError as error:
            refusal(error, name, value)


@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "momentum", "damping", "factor_decay", "inverse_update_period"]
)
def test_wrong_numbers_of_groups_are_refused_by_name(name: str) -> None:
    for value in ODD:
        model, loss_fn = small_net(), nn.CrossEntropyLoss()
        groups = [{"params": model.parameters(), name: value}]
        try:
            opt = KFAC(model, loss_fn, params=groups, **FIXED)
        except ValueError as error:
            refusal(error, name, value)
            continue
        train_step(model, loss_fn, opt, small_batch())
        assert value is HUGE or weights(model).isfinite().all()


SCALARS = [np.float64, torch.tensor, lambda v: torch.tensor([v], dtype=torch.float64)]


@pytest.mark.parametrize("scalar", SCALARS)
@pytest.mark.parametrize("adaptive", [True, False])
def test_scalars_of_other_libraries_are_numbers(
    scalar: Callable[[float], Any], adaptive: bool
) -> None:
    numbers: dict[str, Any] = {
        "lr": 0.5,
        "weight_decay": 0.25,
        "momentum": 0.5,
        "damping": 0.25,
        "factor_decay": 0.75,
        "factor_fraction": 0.5,
    }
    counts = {"factor_update_period": 2, "inverse_update_period": 3, "mc_samples": 2, "seed": 5}

    def run(given: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, adaptive=adaptive, **given)
        for seed in range(4):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
        return weights(model), opt.state_dict()

    own = {name: scalar(value) for name, value in numbers.items()}
    integers = {name: np.int64(value) for name, value in counts.items()}
    (a, left), (b, right) = run({**numbers, **counts}), run({**own, **integers})
    assert torch.equal(a, b)
    assert_same(left["kfac"], right["kfac"])


def test_learning_rates_may_be_tensors_in_groups_and_schedulers() -> None:
    def run(lr: Any) -> torch.Tensor:
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        groups = [{"params": model[0].parameters(), "lr": lr}, {"params": model[2].parameters()}]
        opt = KFAC(model, loss_fn, params=groups, **FIXED)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for seed in range(3):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
            scheduler.step()
        return weights(model)

    assert torch.equal(run(0.25), run(torch.tensor(0.25)))


def test_an_option_of_the_optimizer_is_refused_in_a_group() -> None:
    model = conv_net()
    groups = [{"params": model.parameters(), "nesterov": True}]
    with pytest.raises(ValueError, match="`nesterov` must be the same for all parameters"):
        KFAC(model, nn.CrossEntropyLoss(), params=groups, **FIXED)
    KFAC(model, nn.CrossEntropyLoss(), params=model.parameters(), nesterov=True, **FIXED)


@pytest.mark.parametrize(
    ("model", "loss_fn", "said"),
    [
        (lambda m: m.parameters(), nn.CrossEntropyLoss(), "`model` must be the nn.Module itself"),
        (lambda m: list(m.parameters()), nn.CrossEntropyLoss(), "`model` must be the nn.Module"),
        (lambda m: nn.Linear, nn.CrossEntropyLoss(), "got the class Linear"),
        (lambda m: None, nn.CrossEntropyLoss(), "`model` must be .* got None"),
        (lambda m: m, nn.CrossEntropyLoss, r"Write KFAC\(model, CrossEntropyLoss\(\)\)"),
        (lambda m: m, nn.functional.cross_entropy, "function cross_entropy.*opt.observe"),
        (lambda m: m, lambda a, b: a.sum(), r"Write KFAC\(model, nn.CrossEntropyLoss\(\)\)"),
        (lambda m: m, "cross_entropy", "`loss_fn` must be a loss module"),
        (lambda m: m, 0.1, "`loss_fn` must be a loss module, an instance, got 0.1"),
    ],
)
def test_a_model_or_a_loss_that_is_none(model: Any, loss_fn: Any, said: str) -> None:
    own = conv_net()
    with pytest.raises(TypeError, match=said):
        KFAC(model(own), loss_fn)
    assert not any(m._forward_hooks for m in own.modules())


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(ValueError, match="`model` must have parameters, got Tanh"):
        KFAC(nn.Tanh(), nn.MSELoss())


class Called(nn.Module):
    """A loss whose calls hooks do not see."""

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)


def test_a_loss_whose_calls_cannot_be_seen_is_refused() -> None:
    model, loss_fn = small_net(), Called()
    for take in (KFAC, KFACPreconditioner):
        with pytest.raises(ValueError, match=r"`forward`.*got Called without one.*opt.observe"):
            take(model, loss_fn)
    opt, (x, y) = KFAC(model), small_batch()
    losses = []
    for _ in range(5):
        opt.zero_grad()
        loss = opt.observe(loss_fn(model(x), y))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_a_rule_must_be_an_instance() -> None:
    with pytest.raises(ValueError, match=r"Pass an instance: LevenbergMarquardt\(\)"):
        KFAC(conv_net(), nn.CrossEntropyLoss(), damping=LevenbergMarquardt)  # type: ignore[arg-type]
    KFAC(conv_net(), nn.CrossEntropyLoss(), damping=LevenbergMarquardt())


def test_names_that_do_not_exist_are_refused() -> None:
    model = conv_net()
    with pytest.raises(ValueError, match=r"`parameters` must be names .* got '0.wieght'"):
        KFACPreconditioner(model, nn.CrossEntropyLoss(), parameters=["0.wieght"])
    with pytest.raises(ValueError, match=r"`parameters` must be names of parameters, got '0"):
        KFACPreconditioner(model, nn.CrossEntropyLoss(), parameters="0.weight")
    KFACPreconditioner(model, nn.CrossEntropyLoss(), parameters=["0.weight"])


def test_the_text_of_an_optimizer_names_model_mode_and_what_is_automatic() -> None:
    text = repr(KFAC(conv_net(), nn.CrossEntropyLoss(), damping=0.5, weight_decay=0.125))
    assert "None" not in text
    for part in ("model: Sequential", "adaptive: True", "automatic: step size, momentum"):
        assert part in text
    for part in ("damping: 0.5", "weight_decay: 0.125", "parameters: 6"):
        assert part in text
    assert "automatic" not in repr(KFAC(conv_net(), nn.CrossEntropyLoss(), **FIXED))


def test_a_preconditioner_of_nothing_says_so() -> None:
    model, loss_fn = nn.Sequential(nn.PReLU()), nn.MSELoss()
    with pytest.warns(UserWarning, match="covers no parameter.*register_layer"):
        preconditioner = KFACPreconditioner(model, loss_fn)
    loss_fn(model(torch.tensor([[-1.0]])), torch.ones(1, 1)).backward()
    (before,) = (p.grad.clone() for p in model.parameters() if p.grad is not None)
    preconditioner.step()
    assert torch.equal(model[0].weight.grad, before)

"""Parameter groups that a script changes after the optimizer was made, and arguments of methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn

from einconv_kfac import KFAC

X, Y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
LOSS_FN = nn.CrossEntropyLoss()
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
NAN, INF = float("nan"), float("inf")


def made(options: dict[str, Any]) -> tuple[nn.Module, KFAC]:
    """A model that has taken a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3)).double()
    opt = KFAC(model, LOSS_FN, **options)
    step(model, opt)
    return model, opt


def step(model: nn.Module, opt: KFAC) -> Any:
    opt.zero_grad()
    LOSS_FN(model(X), Y).backward()
    return opt.step()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    "name", ["lr", "weight_decay", "momentum", "damping", "factor_decay", "inverse_update_period"]
)
def test_wrong_numbers_are_refused_by_the_next_step(name: str, options: dict[str, Any]) -> None:
    model, opt = made(options)
    before, known = weights(model), opt.param_groups[0][name]
    for value in (-1, NAN, INF, "0.1", True, 1j, [0.1], torch.ones(2)):
        opt.param_groups[0][name] = value
        with pytest.raises(ValueError, match=f"`{name}` must be"):
            step(model, opt)
        assert torch.equal(before, weights(model))
    opt.param_groups[0][name] = known
    step(model, opt)
    assert not torch.equal(before, weights(model))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    ("name", "value"),
    [*((n, v) for n in ("lr", "weight_decay", "damping") for v in (1e300, 10**400, 1e18)),
     ("damping", 5e-324)],
)  # fmt: skip
def test_numbers_without_a_square_in_single_precision_are_refused(
    name: str, value: Any, options: dict[str, Any]
) -> None:
    model, opt = made(options)
    with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
        KFAC(model, LOSS_FN, **{**options, name: value})
    before = weights(model)
    opt.param_groups[0][name] = value
    with pytest.raises(ValueError, match=f"`{name}` must be a number in"):
        step(model, opt)
    assert torch.equal(before, weights(model))


def test_large_integers_are_numbers() -> None:
    model, opt = made(MODES[1])
    opt.param_groups[0]["lr"] = 2**40
    step(model, opt)
    assert weights(model).isfinite().all()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("other", [nn.Parameter(torch.ones(2)), torch.ones(2)])
def test_another_parameter_among_those_of_a_group(other: Tensor, options: dict[str, Any]) -> None:
    model, opt = made(options)
    before = weights(model)
    opt.param_groups[0]["params"].append(other)
    with pytest.raises(ValueError, match=r"`params` of a group must be .*add_param_group"):
        step(model, opt)
    assert torch.equal(before, weights(model))
    opt.param_groups[0]["params"].pop()
    step(model, opt)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("closure", [True, 1, "closure", torch.ones(())])
def test_a_closure_is_a_function(closure: Any, options: dict[str, Any]) -> None:
    model, opt = made(options)
    before = weights(model)
    with pytest.raises(ValueError, match="`closure` must be a function or None, got"):
        opt.step(closure)
    assert torch.equal(before, weights(model))


def test_a_group_has_parameters() -> None:
    _, opt = made({})
    with pytest.raises(ValueError, match=r"`param_group` must have the entry 'params', got"):
        opt.add_param_group({"lr": 0.1})
    assert len(opt.param_groups) == 1

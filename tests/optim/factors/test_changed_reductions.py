"""A loss whose reduction changes between its call and the step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Generator, Tensor, nn

from einconv_kfac import KFAC

FIXED: dict[str, Any] = {"lr": 0.1, "adaptive": False}


def problem() -> tuple[nn.Module, nn.CrossEntropyLoss, Tensor, Tensor]:
    """Return a model, its loss, and a batch."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    generator = Generator().manual_seed(0)
    x = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    return model, nn.CrossEntropyLoss(), x, torch.randint(3, (6,), generator=generator)


def steps(mode: dict[str, Any], change: Callable[[nn.Module, str, int], None]) -> Tensor:
    """Return the weights after four steps, in which something changes the reduction."""
    model, loss_fn, x, y = problem()
    opt = KFAC(model, loss_fn, fisher="exact", **mode)
    for index in range(4):
        opt.zero_grad()
        change(loss_fn, "call", index)
        loss = loss_fn(model(x), y)
        change(loss_fn, "backward", index)
        loss.backward()
        change(loss_fn, "step", index)
        opt.step()
    return weights(model)


def reduced(before: str) -> Callable[[nn.Module, str, int], None]:
    """Return a change to a sum before a stage; it ends with the step."""

    def change(loss_fn: nn.Module, stage: str, _: int) -> None:
        if stage in ("call", before):
            vars(loss_fn)["reduction"] = "sum" if stage == before else "mean"

    return change


@pytest.mark.parametrize("mode", [{}, FIXED, {**FIXED, "inverse": "ekfac"}])
def test_reduction_counts_as_it_was_at_the_backward_pass(mode: dict[str, Any]) -> None:
    assert torch.equal(steps(mode, reduced("step")), steps(mode, reduced("")))


def test_reduction_that_changes_before_the_backward_pass_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"`loss_fn\.reduction` must be the same .* a sum"):
        steps({}, reduced("backward"))


class Distance(nn.Module):
    """A loss of a script, without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.reduction = "mean"

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        distances = (output - target).square().sum(-1)
        return distances.mean() if self.reduction == "mean" else distances.sum()


@pytest.mark.parametrize("mode", [{}, FIXED])
@pytest.mark.parametrize("kind", [Distance, nn.L1Loss])
def test_reductions_of_losses_without_a_rule(kind: Any, mode: dict[str, Any]) -> None:
    model, _, x, _ = problem()
    loss_fn = kind()
    opt, target = KFAC(model, loss_fn, fisher="empirical", **mode), torch.zeros_like(model(x))
    before = [p.detach().clone() for p in model.parameters()]
    loss = loss_fn(model(x), target)
    loss_fn.reduction = "sum"
    with pytest.raises(RuntimeError, match=r"`loss_fn\.reduction` must be the same from the calls"):
        loss.backward()
    assert all(torch.equal(p, own) for p, own in zip(model.parameters(), before))
    opt.zero_grad()
    loss_fn.reduction = "mean"
    loss_fn(model(x), target).backward()
    opt.step()
    assert not torch.equal(before[0], next(model.parameters()))


def test_losses_of_both_reductions_are_refused() -> None:
    model, loss_fn, x, y = problem()
    opt = KFAC(model, loss_fn, **FIXED)
    loss_fn(model(x), y).backward()
    loss_fn.reduction = "sum"
    with pytest.raises(RuntimeError, match=r"for all losses of a step, got a mean and a sum"):
        loss_fn(model(x), y).backward()
    opt.remove_hooks()

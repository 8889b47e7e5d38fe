"""Gradients that a script saves, clears and puts back by hand: their losses count, or a refusal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner

MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]
Gradients = list[Tensor]


class Script:
    """A model, its optimizer, and a step of two micro-batches."""

    def __init__(self, make: Callable[..., Any] = KFAC, **options: Any) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.loss_fn, self.parameters = nn.CrossEntropyLoss(), list(self.model.parameters())
        self.batches = [(torch.randn(8, 5).double(), torch.randint(3, (8,))) for _ in range(2)]
        self.opt = make(self.model, self.loss_fn, fisher="exact", **options)

    def loss(self, index: int) -> Tensor:
        x, y = self.batches[index]
        return self.loss_fn(self.model(x), y) / 2

    def gradients(self) -> Gradients:
        return [torch.clone(p.grad) for p in self.parameters]  # type: ignore[arg-type]

    def apart(self, clear_: Callable[[], object]) -> tuple[Gradients, Gradients]:
        """Take the gradients of both micro-batches, of which the last stay in `.grad`."""
        self.loss(0).backward()
        first = self.gradients()
        clear_()
        self.loss(1).backward()
        return first, self.gradients()

    def stepped(self) -> Tensor:
        self.opt.step()
        return torch.cat([p.detach().flatten() for p in self.parameters])


def clear_by_none(script: Script) -> None:
    script.model.zero_grad()


def clear_by_zeros(script: Script) -> None:
    script.model.zero_grad(set_to_none=False)


def clear_past_autograd(script: Script) -> None:
    for p in script.parameters:
        p.grad.data.zero_()  # type: ignore[union-attr]


CLEARED = [clear_by_none, clear_by_zeros, clear_past_autograd]


def assign(p: nn.Parameter, first: Tensor, second: Tensor) -> None:
    p.grad = first + second


def copy(p: nn.Parameter, first: Tensor, second: Tensor) -> None:
    p.grad.copy_(first + second)  # type: ignore[union-attr]


def add_past_autograd(p: nn.Parameter, first: Tensor, second: Tensor) -> None:
    p.grad.data.add_(first)  # type: ignore[union-attr]


def project(p: nn.Parameter, first: Tensor, second: Tensor) -> None:
    p.grad = first - (first * second).sum() / second.square().sum() * second


def swap(p: nn.Parameter, first: Tensor, second: Tensor) -> None:
    p.grad = first


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    ("clear_", "put_back"),
    [*((own, assign) for own in CLEARED), *((clear_by_none, own) for own in (copy, project, swap))],
)
def test_gradients_of_cleared_passes_are_refused_in_a_step(
    options: dict[str, Any], clear_: Callable[[Script], None], put_back: Callable[..., None]
) -> None:
    script = Script(**options)
    before = torch.cat([p.detach().flatten() for p in script.parameters])
    found = script.apart(lambda: clear_(script))
    for p, first, second in zip(script.parameters, *found):
        put_back(p, first, second)
    with pytest.raises(RuntimeError, match=r"without `zero_grad` in between.*`discard\(\)`"):
        script.stepped()
    torch.testing.assert_close(
        torch.cat([p.detach().flatten() for p in script.parameters]), before, rtol=0, atol=0
    )


def test_one_parameter_and_the_middle_of_a_step_are_seen() -> None:
    script = Script(lr=0.1, adaptive=False)
    first, _ = script.apart(script.model.zero_grad)
    add_past_autograd(script.parameters[2], first[2], first[2])
    script.loss(1).backward()
    with pytest.raises(RuntimeError, match="put back"):
        script.stepped()


def test_a_preconditioner_refuses_them() -> None:
    script = Script(KFACPreconditioner)
    for p, first, second in zip(script.parameters, *script.apart(script.model.zero_grad)):
        assign(p, first, second)
    with pytest.raises(RuntimeError, match="put back"):
        script.stepped()


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("is_first", [True, False])
def test_returned_gradients_of_a_loss_that_is_not_backpropagated_are_refused(
    options: dict[str, Any], is_first: bool
) -> None:
    script = Script(**options)
    if not is_first:
        script.loss(1).backward()
    found = torch.autograd.grad(script.loss(0), script.parameters)
    if is_first:
        script.loss(1).backward()
    for p, own in zip(script.parameters, found):
        p.grad = p.grad + own  # type: ignore[operator]
    with pytest.raises(RuntimeError, match=r"autograd\.grad.*not.*Backpropagate all"):
        script.stepped()


@pytest.mark.parametrize("options", MODES)
def test_the_remedy_is_the_step_of_all_micro_batches(options: dict[str, Any]) -> None:
    plain, script = Script(**options), Script(**options)
    for index in range(2):
        plain.loss(index).backward()
    losses = [script.loss(0), script.loss(1)]
    found = [torch.autograd.grad(own, script.parameters, retain_graph=True) for own in losses]
    (losses[0] + losses[1]).backward()
    for p, first, second in zip(script.parameters, *found):
        copy(p, first, second)
    torch.testing.assert_close(script.stepped(), plain.stepped(), rtol=1e-12, atol=1e-14)


def clip_by_norm(script: Script) -> None:
    nn.utils.clip_grad_norm_(script.parameters, 0.01)


def clip_by_value(script: Script) -> None:
    nn.utils.clip_grad_value_(script.parameters, 0.01)


def add_noise(script: Script) -> None:
    generator = torch.Generator().manual_seed(1)
    for p in script.parameters:
        p.grad += 0.01 * torch.randn(p.shape, generator=generator)  # type: ignore[operator]


def discard(script: Script) -> None:
    script.model.zero_grad()
    script.opt.discard()


@pytest.mark.filterwarnings("ignore:.*the gradient has other terms, or was changed")
@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize(
    ("clear_", "change_"),
    [
        *((own, clip_by_norm) for own in CLEARED),
        *((own, clip_by_value) for own in (clear_by_none, discard)),
        (clear_by_zeros, add_noise),
    ],
)
def test_passes_that_are_cleared_for_good_leave_nothing_behind(
    options: dict[str, Any], clear_: Callable[[Script], None], change_: Callable[[Script], None]
) -> None:
    plain, script = Script(**options), Script(**options)
    plain.loss(1).backward()
    script.apart(lambda: clear_(script))
    for own in (plain, script):
        change_(own)
    torch.testing.assert_close(script.stepped(), plain.stepped(), rtol=1e-12, atol=1e-14)


@pytest.mark.filterwarnings("ignore:.*the gradient has other terms, or was changed")
@pytest.mark.parametrize("options", MODES)
def test_returned_gradients_that_are_not_added_leave_nothing_behind(
    options: dict[str, Any],
) -> None:
    plain, script = Script(**options), Script(**options)
    torch.autograd.grad(script.loss(0), script.parameters, create_graph=True)
    for own in (plain, script):
        own.loss(1).backward()
        clip_by_value(own)
    torch.testing.assert_close(script.stepped(), plain.stepped(), rtol=1e-12, atol=1e-14)


def test_two_losses_of_one_pass_after_a_cleared_one() -> None:
    steps = []
    for is_preceded in (False, True):
        script = Script(lr=0.1, adaptive=False)
        if is_preceded:
            script.loss(0).backward()
            script.model.zero_grad()
        (script.loss(0) + script.loss(1)).backward()
        (script.loss(0) + script.loss(1)).backward()
        steps.append(script.stepped())
    torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-14)


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    script = Script(lr=0.1, adaptive=False)
    script.apart(script.model.zero_grad)
    for p in script.parameters:
        p.grad.mul_(float("inf"))  # type: ignore[union-attr]
    with pytest.warns(RuntimeWarning, match="not finite"):
        script.stepped()

"""Outputs that a script changes in place before, or after, the loss is computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(1, 4, (24,), generator=GENERATOR)
MASK = torch.rand(24, 4, generator=GENERATOR) < 0.2
EXACT = {"rtol": 1e-8, "atol": 1e-10}


def divided(o: Tensor) -> Tensor:
    o /= 0.7
    return o


def filled(o: Tensor) -> Tensor:
    o[:, 0] = 0
    return o


def masked(o: Tensor) -> Tensor:
    o[MASK] = 0
    return o


def shifted(o: Tensor) -> Tensor:
    o[:, 1:] += 0.3
    return o


def squashed(o: Tensor) -> Tensor:
    return o.tanh_()


WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "divided": (divided, lambda o: o / 0.7),
    "filled": (filled, lambda o: torch.cat([0 * o[:, :1], o[:, 1:]], 1)),
    "masked": (masked, lambda o: o.masked_fill(MASK, 0)),
    "shifted": (shifted, lambda o: o + torch.tensor([0, 0.3, 0.3, 0.3], dtype=torch.float64)),
    "squashed": (squashed, lambda o: o.tanh()),
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4)).double()


def trained(then: Callable[[Tensor], Tensor], given: bool) -> Tensor:
    """The parameters after three steps with a loss on what follows from the output."""
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn if given else None, fisher="exact")
    for _ in range(3):
        opt.zero_grad()
        out = then(model(X))
        loss = loss_fn(out, Y) if given else opt.observe(functional.cross_entropy(out, Y))
        loss.backward()
        opt.step()
    return weights(model)


@cache
def with_a_new_tensor(way: str) -> Tensor:
    """The parameters where the change makes a new tensor."""
    return trained(WAYS[way][1], given=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("given", [False, True])
def test_changes_in_place_are_those_of_a_new_tensor(way: str, given: bool) -> None:
    found = trained(WAYS[way][0], given)
    torch.testing.assert_close(found, with_a_new_tensor(way), **EXACT)


def test_an_output_that_is_changed_after_the_backward_pass() -> None:
    """As by a metric that turns scores into probabilities in place."""
    found = []
    for changed in (False, True):
        model, loss_fn = net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn)
        for _ in range(3):
            opt.zero_grad()
            out = model(X)
            loss_fn(out, Y).backward()
            if changed:
                out.detach().exp_()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, **EXACT)


def test_a_nonlinear_change_of_a_part_is_refused_and_the_remedy_works() -> None:
    model, losses = net(), []
    opt = KFAC(model)
    before = weights(model)
    out = model(X)
    out[:, 1:].sin_()
    opt.observe(functional.cross_entropy(out, Y)).backward()
    with pytest.raises(RuntimeError, match=r"got CopySlices.*in place"):
        opt.step()
    assert torch.equal(before, weights(model))
    for _ in range(6):
        opt.zero_grad()
        out = model(X)
        out = torch.cat([out[:, :1], out[:, 1:].sin()], 1)
        loss = opt.observe(functional.cross_entropy(out, Y))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
def test_an_activation_of_a_part_is_as_out_of_place(options: dict[str, Any]) -> None:
    found = []
    for in_place in (True, False):
        model = net()
        opt = KFAC(model, **options)
        for _ in range(3):
            opt.zero_grad()
            out = model(X)
            if in_place:
                out[:, 1:].sigmoid_()
            else:
                out = torch.cat([out[:, :1], out[:, 1:].sigmoid()], 1)
            opt.observe(functional.cross_entropy(out, Y)).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, **EXACT)


class Overwriting(nn.Module):
    """A network that computes its loss and overwrites the output of its last layer."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.net, self.in_place = net(), in_place

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        logits = self.net(x)
        if self.in_place:
            logits /= 0.7
        else:
            logits = logits / 0.7
        return {"loss": functional.cross_entropy(logits, y), "logits": logits}


def test_a_model_that_overwrites_the_output_of_a_layer() -> None:
    found = []
    for in_place in (False, True):
        model = Overwriting(in_place)
        opt = KFAC(model, fisher="exact")
        for _ in range(3):
            opt.zero_grad()
            model(X, Y)["loss"].backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, **EXACT)


def test_a_change_of_outputs_and_of_parameters_before_the_step_is_refused() -> None:
    """The remedy, a new tensor, trains."""
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for in_place in (True, False):
        opt.zero_grad()
        out = model(X)
        out = divided(out) if in_place else out / 0.7
        loss_fn(out, Y).backward()
        with torch.no_grad():
            model[2].weight.mul_(1.01)
        before = weights(model)
        if in_place:
            with pytest.raises(RuntimeError, match=r"in place.*Write `out = out / t`"):
                opt.step()
            assert torch.equal(before, weights(model))
        else:
            opt.step()
            assert not torch.equal(before, weights(model))


def sequence_net(end: str) -> nn.Sequential:
    """A network for ``[n, 3, 5]`` whose output is a view."""
    torch.manual_seed(0)
    ends = {"whole": nn.Identity(), "turned": Turned(), "part": Part()}
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), ends[end]).double()


class Turned(nn.Module):
    """Classes before positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2)


class Part(nn.Module):
    """The last position."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, -1]


VIEW_CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "divided": divided,
    "filled": filled,
    "squashed": squashed,
    "added": lambda o: o.add_(1.0),
}


FIXED = {"lr": 0.1, "adaptive": False}
WAYS_IN_TURN = ({}, False), ({}, True), (FIXED, False), (FIXED, True)
IN_TURN = [
    (end, change, *WAYS_IN_TURN[(i + j) % 4])
    for i, end in enumerate(("whole", "turned", "part"))
    for j, change in enumerate(VIEW_CHANGES)
]
"""Each end with each change; any two of end, change, mode and owner of the loss meet."""


@pytest.mark.parametrize(("end", "change", "options", "given"), IN_TURN)
def test_a_changed_view_is_refused_and_the_remedy_works(
    end: str, change: str, options: dict[str, float], given: bool
) -> None:
    x = X.unflatten(0, (8, 3))
    loss_fn, found = nn.CrossEntropyLoss(), []
    for way in ("in place", "clone", "new"):
        model = sequence_net(end)
        opt = KFAC(model, loss_fn if given else None, fisher="exact", **options)  # type: ignore[arg-type]
        for _ in range(2):
            opt.zero_grad()
            out = model(x)
            is_view = out._is_view()  # not of a whole linear layer, from PyTorch 2.15 on
            if way == "in place":
                out = VIEW_CHANGES[change](out)
            elif way == "clone":
                out = VIEW_CHANGES[change](out.clone())
            else:
                out = VIEW_CHANGES[change](out * 1)
            targets = Y[: out.numel() // 4].reshape(out.shape[0], -1).squeeze(1)
            scores = out.transpose(1, 2) if end == "whole" else out
            loss = loss_fn(scores, targets)
            loss = loss if given else opt.observe(loss)
            if way == "in place" and is_view:
                before = weights(model)
                with pytest.raises(RuntimeError, match=r"is a view.*out = model\(x\)\.clone\(\)"):
                    loss.backward()
                assert torch.equal(before, weights(model))
                break
            loss.backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[2], **EXACT)
    if is_view:
        assert not torch.equal(found[0], found[1])
    else:
        torch.testing.assert_close(found[0], found[1], **EXACT)


class Keeping(nn.Module):
    """A network that keeps what its output is a view of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.kept = torch.tanh(self.first(x)) @ self.last.weight.mT
        return self.kept[:, :2]


def test_a_loss_of_what_the_output_is_a_view_of_is_no_changed_output() -> None:
    torch.manual_seed(0)
    model = Keeping()
    opt = KFAC(model, exclude=["last"])
    losses = []
    for _ in range(5):
        opt.zero_grad()
        loss = opt.observe(model(X).square().mean() + model.kept.square().mean())
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]

"""Training scripts with something between the model and the loss: the plain script's steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from optim_cases import weights
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC
from einconv_kfac.curvature.losses import snapshot

EXACT = {"rtol": 1e-8, "atol": 1e-10}
N, S, V = 5, 4, 3
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(N, S, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(V, (N, S), generator=GENERATOR)
KEPT = torch.rand(N, S, generator=GENERATOR) < 0.6

WAYS: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]] = {
    "view": (lambda o: o.view(-1, V), Y.view(-1)),
    "reshape": (lambda o: o.reshape(-1, V), Y.reshape(-1)),
    "transpose": (lambda o: o.transpose(1, 2), Y),
    "shift": (lambda o: o[:, :-1].flatten(0, 1), Y[:, 1:].flatten()),
    "mask": (lambda o: o[KEPT], Y[KEPT]),
    "last": (lambda o: o[:, -1], Y[:, -1]),
    "clone": (lambda o: o.clone()[:, 0], Y[:, 0]),
    "float": (lambda o: o.double()[:, 0].contiguous(), Y[:, 0]),
    "temperature": (lambda o: o.transpose(1, 2) / 2.0, Y),
    "squeeze": (lambda o: o[:, :1].squeeze(1), Y[:, 0]),
}


class Then(nn.Module):
    """A network and what follows it, as one model."""

    def __init__(self, net: nn.Module, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.net, self.then = net, then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.net(x))


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, V)).double()


def trained(
    model: nn.Module,
    opt: KFAC,
    loss: Callable[[Tensor], Tensor],
    *,
    observed: bool = False,
    steps: int = 7,
) -> tuple[Tensor, list[float]]:
    losses = []
    for _ in range(steps):  # of seven, two are compared with the prediction of the loss
        opt.zero_grad()
        value = loss(model(X))
        if observed:
            value = opt.observe(value)
        value.backward()
        opt.step()
        losses.append(float(value.detach()))
    return weights(model), losses


def same(found: tuple[Tensor, list[float]], wanted: tuple[Tensor, list[float]]) -> None:
    torch.testing.assert_close(found[0], wanted[0], **EXACT)
    assert found[1] == pytest.approx(wanted[1], rel=1e-9)


@cache
def inside(way: str) -> tuple[Tensor, list[float]]:
    """What `trained` returns where the model itself has what is between it and the loss."""
    then, target = WAYS[way]
    loss_fn, model = nn.CrossEntropyLoss(), Then(net(), then)
    own = KFAC(model, loss_fn, fisher="exact")
    return trained(model, own, lambda o: loss_fn(o, target), steps=4)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("observed", [False, True])
def test_ways_between_model_and_loss(way: str, observed: bool) -> None:
    """A loss module on a tensor that follows from the output, or a functional loss."""
    then, target = WAYS[way]
    loss_fn, model = nn.CrossEntropyLoss(), net()
    if observed:
        own = KFAC(model, fisher="exact")
        found = trained(
            model,
            own,
            lambda o: functional.cross_entropy(then(o), target),
            observed=True,
            steps=4,
        )
    else:
        own = KFAC(model, loss_fn, fisher="exact")
        found = trained(model, own, lambda o: loss_fn(then(o), target), steps=4)
    same(found, inside(way))


def test_a_loss_in_the_output() -> None:
    """As Hugging Face's models return it, with the scores beside it or alone."""

    class Both(nn.Module):
        def __init__(self, alone: bool) -> None:
            super().__init__()
            self.net, self.alone = net(), alone

        def forward(self, x: Tensor, labels: Tensor) -> Any:
            scores = self.net(x)
            loss = functional.cross_entropy(scores.transpose(1, 2), labels)
            return loss if self.alone else {"loss": loss, "logits": scores}

    results = []
    for alone in (False, True):
        model = Both(alone)
        opt = KFAC(model, fisher="exact")
        for _ in range(7):
            opt.zero_grad()
            found = model(X, labels=Y)
            (found if alone else found["loss"]).backward()
            opt.step()
        results.append(weights(model))
    model, loss_fn = Then(net(), lambda o: o.transpose(1, 2)), nn.CrossEntropyLoss()
    wanted, _ = trained(model, KFAC(model, loss_fn, fisher="exact"), lambda o: loss_fn(o, Y))
    for result in results:
        torch.testing.assert_close(result, wanted, **EXACT)


def test_a_penalty_is_weight_decay() -> None:
    """A penalty added by hand, observed, is exactly the optimizer's weight decay."""
    loss_fn, found = nn.CrossEntropyLoss(), []
    for by_hand in (False, True):
        model = Then(net(), lambda o: o.transpose(1, 2))
        opt = KFAC(model, fisher="exact", weight_decay=0.0 if by_hand else 0.02)

        def loss(o: Tensor, model: nn.Module = model, by_hand: bool = by_hand) -> Tensor:
            value = loss_fn(o, Y)
            penalty = sum(p.square().sum() for p in model.parameters())
            return value + 0.01 * penalty if by_hand else value

        damped = opt.param_groups[0]
        damped["damping"] = 0.1  # the decay adds to the damping of the inverses otherwise
        trained(model, opt, loss, observed=True)
        found.append(float(loss_fn(model(X), Y).detach()))
    assert found[1] == pytest.approx(found[0], rel=0.02)


@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
def test_a_penalty_in_a_backward_pass_of_its_own(options: dict[str, Any]) -> None:
    found = []
    for alone in (False, True):
        model = Then(net(), lambda o: o.transpose(1, 2))
        opt = KFAC(model, fisher="exact", **options)
        for _ in range(7):
            opt.zero_grad()
            loss = functional.cross_entropy(model(X), Y)
            penalty = 0.01 * sum(p.square().sum() for p in model.parameters())
            for part in (loss, penalty) if alone else (loss + penalty,):
                opt.observe(part).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0], **EXACT)


def test_a_loss_and_the_whole_count_once() -> None:
    """A loss that ``loss_fn`` computed is a part of the observed one."""
    loss_fn = nn.CrossEntropyLoss()
    model = Then(net(), lambda o: o.transpose(1, 2))
    wanted = trained(model, KFAC(model, fisher="exact"), lambda o: 2 * loss_fn(o, Y), observed=True)
    again = Then(net(), lambda o: o.transpose(1, 2))
    opt = KFAC(again, loss_fn, fisher="exact")
    same(trained(again, opt, lambda o: 2 * loss_fn(o, Y), observed=True), wanted)


def test_entries_with_weights() -> None:
    """``reduction="none"`` followed by weights is the loss with these weights inside."""
    share = torch.rand(V, generator=GENERATOR, dtype=torch.float64) + 0.5
    plain, inside = net(), nn.CrossEntropyLoss(share)
    target = Y[:, 0]
    wanted = trained(plain, KFAC(plain, inside, fisher="exact"), lambda o: inside(o[:, 0], target))
    model, entries = net(), nn.CrossEntropyLoss(reduction="none")
    own = share[target] / share[target].sum()
    opt = KFAC(model, entries, fisher="exact")
    same(trained(model, opt, lambda o: (entries(o[:, 0], target) * own).sum()), wanted)


def test_an_unobserved_term_is_reported_and_followed() -> None:
    model, loss_fn = Then(net(), lambda o: o.transpose(1, 2)), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)

    def loss(o: Tensor) -> Tensor:
        return loss_fn(o, Y) + sum(p.square().sum() for p in model.parameters())

    with pytest.warns(RuntimeWarning, match=r"not explained by the recorded losses.*observe"):
        _, losses = trained(model, opt, loss)
    assert losses[-1] < losses[0]


def test_rounding_is_no_unobserved_term_where_a_loss_vanishes() -> None:
    """A loss of Poisson's, minus its minimum: trained until slopes are rounding errors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 3, generator=generator)
    counts = torch.poisson((1 + 0.3 * x[:, :1]).exp(), generator=generator)
    shift = 0.0
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(3, 1)
        opt = KFAC(model)
        for _ in range(40):
            opt.zero_grad()
            loss = opt.observe(functional.poisson_nll_loss(model(x), counts) - shift)
            loss.backward()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                opt.step()
        shift += loss.item()
    assert abs(loss.item()) < 1e-5


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda o: o.mean(0), "must be a tensor with one number"),
        (lambda o: torch.ones((), requires_grad=True) * 2, "must depend on what the model"),
    ],
)
def test_what_is_no_loss_is_refused(loss: Any, message: str) -> None:
    model = net()
    opt = KFAC(model)
    with pytest.raises(ValueError, match=message):
        opt.observe(loss(model(X)))


def test_an_unknown_operation_is_refused_with_a_remedy() -> None:
    model = net()
    opt = KFAC(model)
    before = weights(model)
    unknown = torch.linalg.pinv(model(X))
    opt.observe((unknown.relu() + unknown).mean()).backward()
    with pytest.raises(
        RuntimeError,
        match=r"must be known.*got LinalgPinv, Relu.*Write `x.clamp.*ompute the loss in",
    ):
        opt.step()
    assert torch.equal(before, weights(model))
    moved = Then(net(), lambda o: torch.linalg.pinv(o).relu())
    opt = KFAC(moved)
    opt.observe(moved(X).mean()).backward()
    opt.step()


def test_a_call_that_was_overwritten_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its tensors are larger than those of which copies are kept."""
    monkeypatch.setattr(snapshot, "LARGEST_COPY", 0)
    model, loss_fn = net(), nn.CrossEntropyLoss()
    opt, x = KFAC(model, loss_fn), X.clone()
    loss_fn(model(x)[:, 0], Y[:, 0]).backward()
    x.zero_()
    with pytest.raises(RuntimeError, match=r"argument 0 of the model, which was overwritten"):
        opt.step()
    opt.zero_grad()
    loss_fn(model(x.copy_(X).clone())[:, 0], Y[:, 0]).backward()
    x.zero_()
    opt.step()

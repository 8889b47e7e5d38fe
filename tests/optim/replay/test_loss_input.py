"""Losses computed inside of the model, on parts of its output, by a user's own module."""

from __future__ import annotations

import gc
import pickle
from collections import OrderedDict
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, objective_of, train_step, weights, with_kl_clip
from torch import Tensor, nn

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.curvature.losses import EntrywiseRule, register_loss
from einconv_kfac.optim.step.fits.quadratic_model import quadratic_model

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


class WithLoss(nn.Module):
    """A network that returns its loss, by keyword if asked to, and counts what it computes."""

    def __init__(self, *, random_layers: bool = False, keyword: bool = False) -> None:
        super().__init__()
        self.net, self.loss_fn = conv_net(random_layers=random_layers), nn.CrossEntropyLoss()
        self.keyword = keyword

    def forward(self, x: Tensor, y: Tensor) -> Any:
        scores = self.net(x)
        with torch.no_grad():
            self.shown = self.loss_fn(scores, y)  # for a progress bar
        if self.keyword:
            return {"loss": self.loss_fn(input=scores, target=y), "scores": scores}
        return self.loss_fn(scores, y)


class TwoHeads(nn.Module):
    """A body with two heads of as many classes."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.loss_fn = kind, nn.CrossEntropyLoss()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh()).double()
        self.heads = nn.ModuleList([nn.Linear(5, 3), nn.Linear(5, 3)]).double()

    def forward(self, x: Tensor, y: Tensor | None = None) -> Any:
        z = self.body(x)
        if self.kind == "inside":
            return self.loss_fn(self.heads[0](z), y) + self.loss_fn(self.heads[1](z), 2 - y)
        outputs = [head(z) for head in self.heads]
        if self.kind == "concatenated":  # examples twice: their mean is half of the sum
            return torch.cat(outputs)
        return outputs if self.kind == "list" else OrderedDict(a=outputs[0], b=(outputs[1],))


def two_head_loss(model: TwoHeads, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    if model.kind == "inside":
        return model(x, y)
    outputs = model(x)
    if model.kind == "concatenated":
        return 2 * loss_fn(outputs, torch.cat([y, 2 - y]))
    a, b = outputs if model.kind == "list" else (outputs["a"], outputs["b"][0])
    return loss_fn(a, y) + loss_fn(b, 2 - y)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("keyword", [False, True])
@pytest.mark.parametrize("random_layers", [False, True])
def test_a_loss_inside_of_the_model(
    random_layers: bool, keyword: bool, options: dict[str, Any]
) -> None:
    """The steps are those of the loss outside, bit for bit."""
    plain, loss_fn = conv_net(random_layers=random_layers), nn.CrossEntropyLoss()
    model = WithLoss(random_layers=random_layers, keyword=keyword)
    opts = KFAC(plain, loss_fn, **options), KFAC(model, model.loss_fn, **options)
    for seed in range(3):
        x, y = image_batch(seed=seed)
        torch.manual_seed(seed)
        train_step(plain, loss_fn, opts[0], (x, y))
        torch.manual_seed(seed)
        opts[1].zero_grad()
        found = model(x, y)
        (found["loss"] if keyword else found).backward()
        opts[1].step()
    assert torch.equal(weights(plain), weights(model))


def test_evaluation_and_accumulation_with_a_loss_inside() -> None:
    model, (x, y) = WithLoss(), image_batch()
    opt = KFAC(model, model.loss_fn, fisher="exact")
    whole, loss_fn = conv_net(), nn.CrossEntropyLoss()
    plain = KFAC(whole, loss_fn, fisher="exact")
    for _ in range(3):
        opt.zero_grad()
        for rows in (slice(0, 6), slice(6, 12)):
            (model(x[rows], y[rows]) / 2).backward()
            with torch.no_grad():
                model(x, y)
            model(x, y)  # with a graph that is thrown away
        opt.step()
        train_step(whole, loss_fn, plain, (x, y))
    torch.testing.assert_close(weights(model), weights(whole), rtol=1e-6, atol=1e-9)


def test_a_copy_goes_on_with_a_loss_inside() -> None:
    model = WithLoss()
    opt = KFAC(model, model.loss_fn)
    copies = []
    for turn in range(2):
        copies.append(pickle.loads(pickle.dumps((model, opt))) if turn else (model, opt))
        for copy, own in copies:
            own.zero_grad()
            copy(*image_batch(seed=turn)).backward()
            own.step()
    assert torch.equal(*(weights(copy) for copy, _ in copies))


@pytest.mark.parametrize("kind", ["inside", "list", "mapping"])
def test_two_losses_of_one_forward_pass(kind: str) -> None:
    """The quadratic model is that of their sum."""
    x, y = image_batch()
    predicted = []
    for way in (kind, "concatenated"):
        model = TwoHeads(way)
        opt = KFAC(model, model.loss_fn, fisher="exact", damping=0.1)
        two_head_loss(model, model.loss_fn, x, y).backward()
        gradient = {name: p.grad for name, p in model.named_parameters()}
        batches = opt._preconditioner.recorder.take()
        parameters = dict(model.named_parameters())
        objective = objective_of(parameters, gradient=gradient, batches=batches)
        found = quadratic_model(opt._preconditioner.replay, objective, [gradient])
        predicted.append(torch.stack([found.slope[0], found.curvature[0, 0]]))
    torch.testing.assert_close(*predicted, **EXACT)


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("kind", ["inside", "list", "mapping"])
def test_two_heads_train(kind: str, options: dict[str, Any]) -> None:
    model, (x, y) = TwoHeads(kind), image_batch()
    opt = KFAC(model, model.loss_fn, **with_kl_clip(options, None))
    losses = []
    for _ in range(8):
        opt.zero_grad()
        loss = two_head_loss(model, model.loss_fn, x, y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_a_loss_that_is_not_called_again_is_refused() -> None:
    class Alternating(WithLoss):
        calls = 0

        def forward(self, x: Tensor, y: Tensor) -> Any:
            self.calls += 1
            scores = self.net(x)
            if self.calls % 2:
                return self.loss_fn(scores, y)
            return nn.functional.cross_entropy(scores, y)

    model = Alternating()
    opt = KFAC(model, model.loss_fn)
    before = weights(model)
    model(*image_batch()).backward()
    with pytest.raises(RuntimeError, match=r"must reach call number 1 of `loss_fn` again"):
        opt.step()
    assert torch.equal(before, weights(model))


def test_a_loss_inside_of_a_compiled_model() -> None:
    """With fixed rates it trains; the automatic step would not see it in compiled code."""
    plain, model = WithLoss(), WithLoss()
    for run in (plain, torch.compile(model, backend="eager")):
        opt = KFAC(run, (plain if run is plain else model).loss_fn, lr=0.1, adaptive=False)
        for seed in range(24):
            opt.zero_grad()
            run(*image_batch(seed=seed)).backward()
            opt.step()
    torch.testing.assert_close(weights(model), weights(plain), **EXACT)
    before = weights(model)
    run = torch.compile(model, backend="eager")
    opt = KFAC(run, model.loss_fn)
    run(*image_batch()).backward()
    with pytest.raises(RuntimeError, match="must be called outside of a compiled model"):
        opt.step()
    assert torch.equal(before, weights(model))


def test_the_preconditioner_takes_a_loss_inside() -> None:
    plain, loss_fn, model = conv_net(), nn.CrossEntropyLoss(), WithLoss()
    x, y = image_batch()
    machines = KFACPreconditioner(plain, loss_fn), KFACPreconditioner(model, model.loss_fn)
    loss_fn(plain(x), y).backward()
    model(x, y).backward()
    for machine in machines:
        machine.step()
    for a, b in zip(plain.parameters(), model.parameters()):
        assert torch.equal(a.grad, b.grad)


def test_replays_leave_no_hooks_and_no_graphs() -> None:
    model = WithLoss()
    opt = KFAC(model, model.loss_fn)

    def alive() -> tuple[int, int]:
        gc.collect()
        hooks = len(model.loss_fn._forward_hooks) + len(model.loss_fn._forward_pre_hooks)
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects()), hooks

    counts = []
    for seed in range(15):
        opt.zero_grad()
        model(*image_batch(seed=seed)).backward()
        opt.step()
        if seed in {4, 14}:
            counts.append(alive())
    (early, hooks), (late, left) = counts
    assert late <= early
    assert hooks == left


class StudentT(nn.Module):
    """Negative log-likelihood of Student's distribution, near its centre."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, output: Tensor, target: Tensor) -> Tensor:
        terms = (1 + (output - target).square() / 100).log() * 50.5
        return terms.mean() if self.reduction == "mean" else terms.sum()


register_loss(StudentT, EntrywiseRule())


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_likelihood_of_the_users(reduction: str) -> None:
    """Where Student's distribution is nearly normal, the steps are those of squared errors."""
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = 1e-4 * x[:, :2].sin()
    found = []
    for loss_fn, scale in ((StudentT(reduction), 1.0), (nn.MSELoss(reduction=reduction), 0.505)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).double()
        for parameter in model.parameters():
            parameter.data.mul_(1e-3)
        opt = KFAC(model, loss_fn, fisher="exact")
        for _ in range(5):
            opt.zero_grad()
            (scale * loss_fn(model(x), y)).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward-only"])
def test_a_likelihood_of_the_users_trains_in_every_fisher(fisher: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 4, dtype=torch.float64)
    model, loss_fn = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 1)), StudentT()
    opt = KFAC(model.double(), loss_fn, fisher=fisher)
    losses = [train_step(model, loss_fn, opt, (x, x[:, :1].sin())) for _ in range(12)]
    assert losses[-1] < 0.1 * losses[0]


def test_losses_of_several_targets() -> None:
    """A Gaussian likelihood of unit variance is half the squared error."""
    x = torch.randn(12, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for loss_fn in (nn.GaussianNLLLoss(), nn.MSELoss()):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).double()
        opt = KFAC(model, loss_fn, fisher="exact", damping=1e-3)
        for _ in range(6):
            opt.zero_grad()
            if isinstance(loss_fn, nn.MSELoss):
                (loss_fn(model(x), x[:, :2]) / 2).backward()
            else:
                loss_fn(model(x), target=x[:, :2], var=torch.ones(12, 1).double()).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

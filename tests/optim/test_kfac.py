"""KFAC: what a step does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC
from einconv_kfac.optim.schedule import is_due

EXACT = {"rtol": 1e-9, "atol": 1e-11}
FLOAT = {"rtol": 1e-5, "atol": 1e-7}


def trained(batches: list[Any], *, reduction: str = "mean", **options: Any) -> nn.Sequential:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss(reduction=reduction)
    opt = KFAC(model, loss_fn, **options)
    for batch in batches:
        train_step(model, loss_fn, opt, batch)
    return model


def test_one_step_solves_linear_least_squares() -> None:
    """Expand is exact for one linear layer, so the step is Newton's."""
    torch.manual_seed(0)
    x, y = torch.randn(40, 5).double(), torch.randn(40, 3).double()
    model, loss_fn = nn.Linear(5, 3).double(), nn.MSELoss()
    opt = KFAC(model, loss_fn, damping=1e-12, fisher="exact")
    train_step(model, loss_fn, opt, (x, y))
    solution = torch.linalg.lstsq(torch.cat([x, torch.ones(40, 1).double()], 1), y).solution
    torch.testing.assert_close(model.weight.detach(), solution[:-1].T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.bias.detach(), solution[-1], rtol=1e-4, atol=1e-5)


def test_fixed_step_is_the_definition() -> None:
    """One step equals factored damping with dense Kronecker products, clipping and decay."""
    torch.manual_seed(0)
    x, y = torch.randn(7, 4).double(), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    model, loss_fn = nn.Linear(4, 3, bias=False).double(), nn.CrossEntropyLoss()
    before = model.weight.detach().clone()
    opt = KFAC(
        model, loss_fn, lr=0.5, adaptive=False, damping=0.2, weight_decay=0.1, fisher="exact",
        kl_clip=1e-3,
    )  # fmt: skip
    train_step(model, loss_fn, opt, (x, y))
    p = (x @ before.T).softmax(1)
    a = x.T @ x / 7
    b = torch.stack([torch.diag(q) - torch.outer(q, q) for q in p]).mean(0)
    gradient = (p - torch.eye(3).double()[y]).T @ x / 7 + 0.1 * before
    pi = ((a.trace() / 4) / (b.trace() / 3)).sqrt()
    root = 0.3**0.5  # damping and weight decay
    eyes = torch.eye(3).double(), torch.eye(4).double()
    damped = torch.kron(b + root / pi * eyes[0], a + pi * root * eyes[1])
    step = torch.linalg.solve(damped, gradient.flatten()).reshape(3, 4)
    clip = min(1.0, float((1e-3 / (0.25 * (step * gradient).sum())).sqrt()))
    assert clip < 1
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * clip * step, **EXACT)


def test_momentum_is_heavy_ball() -> None:
    batches = [image_batch(seed=s) for s in range(3)]
    options = {"adaptive": False, "damping": 0.1, "kl_clip": None, "fisher": "exact"}
    positions = [weights(conv_net())]
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, lr=0.1, momentum=lambda step: 0.0 if step < 2 else 0.5, **options)
    for batch in batches:
        train_step(model, loss_fn, opt, batch)
        positions.append(weights(model))
    plain = trained(batches, lr=0.1, momentum=0.0, **options)
    expected = weights(plain) + 0.5 * (positions[2] - positions[1])
    torch.testing.assert_close(positions[3], expected, **EXACT)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_duplicated_examples_change_nothing(options: dict[str, Any]) -> None:
    batches = [image_batch(seed=s) for s in range(4)]
    doubled = [(x.repeat(2, 1, 1, 1), y.repeat(2)) for x, y in batches]
    once, twice = (trained(b, fisher="exact", **options) for b in (batches, doubled))
    torch.testing.assert_close(weights(once), weights(twice), **FLOAT)


def test_automatic_step_does_not_see_the_scale_of_the_loss() -> None:
    batches = [image_batch(seed=s) for s in range(5)]
    mean = trained(batches, fisher="exact")
    total = trained(batches, fisher="exact", reduction="sum")
    torch.testing.assert_close(weights(mean), weights(total), **FLOAT)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
def test_accumulated_batches_are_one_batch(options: dict[str, Any]) -> None:
    x, y = image_batch(12)
    whole = trained([(x, y)] * 3, fisher="exact", **options)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for _ in range(3):
        opt.zero_grad()
        for part in range(3):
            rows = slice(4 * part, 4 * part + 4)
            (loss_fn(model(x[rows]), y[rows]) / 3).backward()
        opt.step()
    torch.testing.assert_close(weights(model), weights(whole), **FLOAT)


@pytest.mark.parametrize("random_layers", [False, True])
@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward-only"])
def test_automatic_training_reduces_the_loss(random_layers: bool, fisher: Any) -> None:
    model, loss_fn = conv_net(random_layers=random_layers), nn.CrossEntropyLoss()
    opt, (x, y) = KFAC(model, loss_fn, fisher=fisher), image_batch(24)

    def loss() -> float:
        """Return the loss without dropout, which changes that of each step."""
        with torch.no_grad():
            value = float(loss_fn(model.eval()(x), y))
        model.train()
        return value

    first = loss()
    for _ in range(9):
        train_step(model, loss_fn, opt, (x, y))
    assert loss() < 0.3 * first


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_fixed_training_reduces_the_loss(approximation: Any) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, lr=0.3, adaptive=False, approximation=approximation, kl_clip=1e-1)
    losses = [train_step(model, loss_fn, opt, image_batch(24)) for _ in range(10)]
    assert losses[-1] < 0.3 * losses[0]


def test_a_step_leaves_gradients_random_state_and_statistics_alone() -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    buffers = [b.clone() for b in model.buffers()]
    state = torch.get_rng_state()
    opt.step()
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(buffers, model.buffers()))


def test_a_backward_pass_leaves_the_random_state_alone() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="mc")
    x, y = image_batch()
    state = torch.get_rng_state()
    loss_fn(model(x), y).backward()
    assert torch.equal(state, torch.get_rng_state())
    opt.remove_hooks()


def test_gradients_are_those_without_the_optimizer() -> None:
    x, y = image_batch()
    plain, watched, loss_fn = conv_net(), conv_net(), nn.CrossEntropyLoss()
    loss_fn(plain(x), y).backward()
    opt = KFAC(watched, loss_fn)
    loss_fn(watched(x), y).backward()
    for a, b in zip(plain.parameters(), watched.parameters()):
        assert torch.equal(a.grad, b.grad)
    opt.remove_hooks()


def test_coverage_names_the_rule_of_every_parameter() -> None:
    model = conv_net(random_layers=True)
    coverage = KFAC(model, nn.CrossEntropyLoss()).coverage()
    assert coverage.keys() == dict(model.named_parameters()).keys()
    assert {name for name, rule in coverage.items() if rule == "adam"} == {"6.weight"}
    assert str(coverage).splitlines()[0].split() == ["parameter", "trained", "by"]


def test_uncovered_parameters_are_trained() -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    before = [p.detach().clone() for p in model.parameters()]
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    moved = [not torch.equal(a, b) for a, b in zip(before, model.parameters())]
    names = [name for name, _ in model.named_parameters()]
    # a bias in front of batch normalisation has no gradient but rounding
    assert all(m for m, name in zip(moved, names) if name != "0.bias")


def test_frozen_parameters_stay() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    frozen = [model[0].weight, model[0].bias, model[2].bias]
    before = [p.clone() for p in frozen]
    opt = KFAC(model, loss_fn)
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(4)]
    assert all(torch.equal(a, b) for a, b in zip(before, frozen))
    assert losses[-1] < losses[0]


def test_parameter_groups_scale_their_part_of_the_step() -> None:
    batch, loss_fn = image_batch(), nn.CrossEntropyLoss()
    model = conv_net()
    groups = [
        {"params": model[0].parameters(), "lr": 0.0},
        {"params": [*model[2].parameters(), *model[5].parameters()]},
    ]
    first = model[0].weight.detach().clone()
    opt = KFAC(model, loss_fn, params=groups)
    losses = [train_step(model, loss_fn, opt, batch) for _ in range(4)]
    assert torch.equal(first, model[0].weight)
    assert losses[-1] < losses[0]


def test_schedulers_scale_the_automatic_step() -> None:
    batch, loss_fn = image_batch(), nn.CrossEntropyLoss()
    steps: list[Tensor] = []
    for factor in (1.0, 0.5):
        model = conv_net()
        opt = KFAC(model, loss_fn, fisher="exact")
        scheduler = torch.optim.lr_scheduler.LambdaLR(opt, lambda _, f=factor: f)
        train_step(model, loss_fn, opt, batch)
        scheduler.step()
        steps.append(weights(model) - weights(conv_net()))
    torch.testing.assert_close(steps[1], steps[0] / 2, **EXACT)


def test_closure_is_evaluated_and_returned() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    x, y = image_batch()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        return loss

    losses = [opt.step(closure).item() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_evaluation_between_steps_changes_nothing() -> None:
    batches = [image_batch(seed=s) for s in range(4)]
    plain = trained(batches)
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    for batch in batches:
        with torch.no_grad():
            loss_fn(model(image_batch(3)[0]), image_batch(3)[1])
        loss_fn(model(image_batch(4)[0]), image_batch(4)[1])  # never backpropagated
        train_step(model, loss_fn, opt, batch)
    torch.testing.assert_close(weights(model), weights(plain), **EXACT)


def test_periodic_work_is_due_early_and_then_periodically() -> None:
    done, last = [], None
    for step in range(400):
        if is_due(step, last, 10):
            done.append(step)
            last = step
    assert done[:20] == list(range(20))
    assert {b - a for a, b in zip(done[-20:], done[-19:])} == {10}

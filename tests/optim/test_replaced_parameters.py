"""Parameters that are replaced, added or frozen later, and sparse gradients."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import assert_same, conv_net, image_batch, train_step, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from einconv_kfac import KFAC, KFACPreconditioner

MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


def assign(model: nn.Sequential) -> None:
    """Assign other parameters."""
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()}, assign=True)


def new_layer(model: nn.Sequential) -> None:
    """Replace a layer."""
    model[5] = nn.Linear(36, 3).double()


class Adapter(nn.Module):
    """A layer with a low-rank addition."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.down = base, nn.Linear(36, 1, dtype=torch.float64)
        self.up = nn.Linear(1, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def adapter(model: nn.Sequential) -> None:
    """Inject an adapter."""
    model[5] = Adapter(model[5])


def parametrize(model: nn.Sequential) -> None:
    """Parametrize a weight."""
    nn.utils.parametrizations.weight_norm(model[5])


def remove_bias(model: nn.Sequential) -> None:
    """Remove the bias of a layer."""
    model[5].bias = None


REPLACEMENTS = [new_layer, adapter, parametrize, remove_bias]


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_replaced_parameters_are_refused_and_a_new_optimizer_trains_them(
    replace: Callable[[nn.Sequential], None], options: dict[str, Any]
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    train_step(model, loss_fn, opt, image_batch())
    replace(model)
    before, state = weights(model), deepcopy(opt.state_dict())
    x, y = image_batch()
    loss = loss_fn(model(x), y)
    with pytest.raises(RuntimeError, match=r"for '[05].(weight|bias)'. Make a new optimizer"):
        opt.step()
    assert torch.equal(before, weights(model))
    assert_same(state["kfac"], opt.state_dict()["kfac"])
    with pytest.raises(RuntimeError, match="Make a new optimizer"):
        opt.load_state_dict(state)
    assert "kfac" not in [kind for n, kind in opt.coverage().items() if n.startswith("5.up")]
    del loss
    opt.remove_hooks()
    train_step(model, loss_fn, KFAC(model, loss_fn, **options), image_batch())
    assert not torch.equal(before, weights(model))


@pytest.mark.parametrize("replace", REPLACEMENTS)
def test_replaced_parameters_of_a_preconditioner(
    replace: Callable[[nn.Sequential], None],
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    preconditioner = KFACPreconditioner(model, loss_fn)
    replace(model)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters()}
    with pytest.raises(RuntimeError, match="Make a new optimizer"):
        preconditioner.step()
    assert all(torch.equal(p.grad, before[n]) for n, p in model.named_parameters())


@pytest.mark.parametrize("options", MODES)
def test_assigned_parameters_are_trained_in_place_of_the_others(options: dict[str, Any]) -> None:
    found = []
    for assigned in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **options)
        for step in range(4):
            if assigned and step in (0, 2):
                assign(model)
            train_step(model, loss_fn, opt, image_batch(seed=step))
        found.append(weights(model))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [*MODES, {"inverse": "ekfac", "weight_decay": 0.01}])
@pytest.mark.parametrize("is_used", [False, True])
def test_a_run_resumes_with_assigned_parameters(options: dict[str, Any], is_used: bool) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for step in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=step))
    other = conv_net(seed=1)
    again = KFAC(other, loss_fn, **options)
    if is_used:
        train_step(other, loss_fn, again, image_batch(seed=7))
    saved = deepcopy((model.state_dict(), opt.state_dict()))
    other.load_state_dict(saved[0], assign=True)
    assert again.coverage().keys() == opt.coverage().keys()
    assert set(again.coverage().values()) == {"kfac"}
    again.load_state_dict(saved[1])
    for step in range(3, 6):
        train_step(model, loss_fn, opt, image_batch(seed=step))
        train_step(other, loss_fn, again, image_batch(seed=step))
    assert torch.equal(weights(model), weights(other))


def test_a_group_is_added_after_parameters_were_assigned() -> None:
    found = []
    for assigned in (False, True):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        last = [*model[5].parameters()]
        opt = KFAC(model, loss_fn, params=[*model[0].parameters(), *model[2].parameters()])
        if assigned:
            assign(model)
            last = [*model[5].parameters()]
        opt.add_param_group({"params": last, "weight_decay": 0.1})
        for step in range(3):
            train_step(model, loss_fn, opt, image_batch(seed=step))
        found.append(weights(model))
    assert torch.equal(*found)


def test_conversions_that_keep_parameters_are_no_replacement() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    train_step(model, loss_fn, opt, image_batch())
    model.to(torch.float32).to(torch.float64)
    model.load_state_dict({n: t.clone() for n, t in model.state_dict().items()})
    train_step(model, loss_fn, opt, image_batch())


@pytest.mark.parametrize("options", MODES)
def test_a_layer_that_is_appended_later_is_left_out_until_it_is_added(
    options: dict[str, Any],
) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    model.append(nn.Linear(3, 3).double())
    own = model[6].weight.detach().clone()
    assert opt.coverage()["6.weight"] == "left out"
    train_step(model, loss_fn, opt, image_batch())
    assert torch.equal(own, model[6].weight)
    opt.add_param_group({"params": model[6].parameters()})
    assert opt.coverage()["6.weight"] == opt.coverage()["6.bias"] == "kfac"
    train_step(model, loss_fn, opt, image_batch())
    assert not torch.equal(own, model[6].weight)


def test_a_bias_whose_weight_is_frozen_later_is_left_to_the_fallback() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, 0.1, adaptive=False)
    model[5].weight.requires_grad_(False)
    assert opt.coverage()["5.weight"] == "frozen"
    assert opt.coverage()["5.bias"] == "gradient"
    before = model[5].bias.detach().clone()
    train_step(model, loss_fn, opt, image_batch())
    assert torch.allclose(model[5].bias, before - 0.1 * model[5].bias.grad)


def sparse_net() -> nn.Sequential:
    """A model with sparse gradients."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(20, 4, sparse=True), nn.Flatten(), nn.Linear(24, 3))


@pytest.mark.parametrize("options", MODES)
def test_sparse_gradients_are_refused_and_both_remedies_work(options: dict[str, Any]) -> None:
    x, y = torch.randint(20, (32, 6)), torch.randint(3, (32,))
    model, loss_fn = sparse_net(), nn.CrossEntropyLoss()
    groups = [{"params": model[2].parameters()}, {"params": model[0].parameters(), "lr": 0.1}]
    opt = KFAC(model, loss_fn, exclude=["0"], params=groups, **options)
    before = weights(model)
    loss_fn(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"'0.weight' must be dense, got a sparse gradient"):
        opt.step()
    assert torch.equal(before, weights(model))
    opt.remove_hooks()
    model.zero_grad()
    model[0].sparse = False
    train_step(model, loss_fn, KFAC(model, loss_fn, exclude=["0"], **options), (x, y))

    model = sparse_net()
    opt = KFAC(model, loss_fn, params=model[2].parameters(), **options)
    other = torch.optim.SparseAdam(model[0].parameters())
    loss_fn(model(x), y).backward()
    opt.step()
    other.step()


def test_a_preconditioner_leaves_sparse_gradients_of_other_layers_alone() -> None:
    x, y = torch.randint(20, (32, 6)), torch.randint(3, (32,))
    model, loss_fn = sparse_net(), nn.CrossEntropyLoss()
    preconditioner = KFACPreconditioner(model, loss_fn, exclude=["0"])
    loss_fn(model(x), y).backward()
    before = model[0].weight.grad.to_dense()
    preconditioner.step()
    assert torch.equal(before, model[0].weight.grad.to_dense())


@pytest.mark.parametrize("options", MODES)
def test_what_was_gathered_is_discarded_on_purpose(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    other = KFAC(twin := deepcopy(model), loss_fn, **options)
    x, y = image_batch(seed=9)
    loss_fn(model(x), y).backward()
    opt.discard()
    for seed in range(3):
        train_step(model, loss_fn, opt, image_batch(seed=seed))
        train_step(twin, loss_fn, other, image_batch(seed=seed))
    assert torch.equal(weights(model), weights(twin))
    assert_same(opt.state_dict()["kfac"], other.state_dict()["kfac"])


def adapted(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Scores of some images after a step of gradient descent on the others."""
    names, own = zip(*net.named_parameters())
    scores = functional_call(net, dict(zip(names, own)), (x[:6],))
    slopes = torch.autograd.grad(cross_entropy(scores, y[:6]), own, create_graph=True)
    moved = {name: p - 0.1 * slope for name, p, slope in zip(names, own, slopes)}
    return functional_call(net, moved, (x[6:],))


class Adapted(nn.Module):
    """The same as a module."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return adapted(self.net, x, y)


def adapt(opt: KFAC, scores: Callable[[], Tensor], count: int = 12) -> list[float]:
    losses = []
    for _ in range(count):
        opt.zero_grad()
        loss = opt.observe(cross_entropy(scores(), image_batch()[1][6:]))
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    return losses


def test_tensors_in_place_of_parameters_are_refused_and_in_a_module_they_train() -> None:
    net, batch = conv_net(), image_batch()
    opt = KFAC(net)
    before = weights(net)
    with pytest.raises(RuntimeError, match=r"own parameters .* in place of '0.weight'"):
        adapt(opt, lambda: adapted(net, *batch))
    assert torch.equal(before, weights(net))
    model = Adapted()
    losses = adapt(KFAC(model), lambda: model(*batch))
    assert losses[-1] < 0.5 * losses[0]


def test_tensors_in_place_of_parameters_train_with_fixed_rates() -> None:
    net, model, batch = conv_net(), Adapted(), image_batch()
    options: dict[str, Any] = {"lr": 0.1, "adaptive": False, "fisher": "exact"}
    adapt(KFAC(net, **options), lambda: adapted(net, *batch))
    adapt(KFAC(model, **options), lambda: model(*batch))
    torch.testing.assert_close(weights(net), weights(model), rtol=1e-9, atol=1e-11)

"""KFAC: factors never silently stop updating, whatever runs the model."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from einconv_kfac import KFAC, KFACPreconditioner
from einconv_kfac.optim.recording.kept_calls import SMALL_CALLS_WITHOUT_LOSS

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [{}, {"lr": 0.1, "adaptive": False}]


class Checkpointed(nn.Module):
    """A network whose first layers run again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.net, self.reentrant = conv_net(), reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = x.requires_grad_() if self.reentrant else x
        y: Tensor = checkpoint(self.net[:4], x, use_reentrant=self.reentrant)
        return self.net[4:](y)


def updates(opt: KFAC) -> list[int]:
    layers = opt.state_dict()["kfac"]["preconditioner"]["layers"]
    return [layer["updates"] for layer in layers.values()]


def trained(model: nn.Module, run: nn.Module, options: dict[str, Any], steps: int = 4) -> KFAC:
    """Train a model by calling ``run`` on batches."""
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, fisher="exact", **options)
    for seed in range(steps):
        train_step(run, loss_fn, opt, image_batch(seed=seed))
    return opt


@pytest.mark.parametrize("options", MODES)
def test_a_compiled_model_is_captured(options: dict[str, Any]) -> None:
    plain, model = conv_net(), conv_net()
    periods = {"factor_update_period": 2, **options}
    trained(plain, plain, periods, 24)
    compiled = torch.compile(model, backend="eager")
    opt = trained(compiled, compiled, periods, 24)
    assert all(10 < count < 24 for count in updates(opt))
    torch.testing.assert_close(weights(model), weights(plain), **EXACT)
    assert "2.weight" in opt.coverage()


def test_a_compiled_model_runs_compiled_between_factor_updates() -> None:
    graphs, runs = [], []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return lambda *inputs: runs.append(0) or graph(*inputs)

    compiled = torch.compile(conv_net(), backend=backend)
    opt = trained(compiled, compiled, {"lr": 0.1, "adaptive": False, "factor_update_period": 4}, 60)
    assert len(graphs) == 1
    assert len(runs) == 60 - updates(opt)[0] > 0
    opt.remove_hooks()
    compiled(image_batch()[0])
    assert len(runs) == 61 - updates(opt)[0]


@pytest.mark.parametrize("options", MODES)
def test_what_only_a_copy_compiled_elsewhere_saw_is_refused(options: dict[str, Any]) -> None:
    model = conv_net()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"pass `torch.compile\(model\)` itself"):
        trained(model, torch.compile(model, backend="eager"), options)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("options", MODES)
@pytest.mark.parametrize("part", ["", "0"])
def test_modules_compiled_in_place_are_refused(part: str, options: dict[str, Any]) -> None:
    model = conv_net()
    before = weights(model)
    torch._dynamo.reset()  # what was compiled too often runs as it is
    model.get_submodule(part).compile(backend="eager")
    with pytest.raises(RuntimeError, match=r"The factors of '0'.* need calls.*compile"):
        trained(model, model, options)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("options", MODES)
def test_checkpointed_layers_are_captured(options: dict[str, Any]) -> None:
    plain, model = conv_net(), Checkpointed(reentrant=False)
    trained(plain, plain, options)
    opt = trained(model, model, options)
    assert updates(opt) == [4, 4, 4]
    torch.testing.assert_close(weights(model), weights(plain), **EXACT)


@pytest.mark.parametrize("options", MODES)
def test_reentrant_checkpoints_are_refused(options: dict[str, Any]) -> None:
    model = Checkpointed(reentrant=True)
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"'net\.0', 'net\.2' need calls.*use_reentrant=False"):
        trained(model, model, options)
    assert torch.equal(before, weights(model))


@pytest.mark.parametrize("fisher", ["mc", "exact", "empirical", "forward-only"])
@pytest.mark.parametrize("options", MODES)
def test_a_layer_whose_output_the_loss_never_uses(fisher: Any, options: dict[str, Any]) -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = conv_net(), nn.Linear(36, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            self.seen = self.head(x.flatten(1))
            return self.net(x)

    model, loss_fn = Auxiliary(), nn.CrossEntropyLoss()
    head = model.head.weight.detach().clone()
    opt = KFAC(model, loss_fn, fisher=fisher, **options)
    losses = [train_step(model, loss_fn, opt, image_batch()) for _ in range(5)]
    assert losses[-1] < losses[0]
    assert torch.equal(head, model.head.weight)


def test_a_layer_used_every_other_step_is_updated() -> None:
    """Two heads that take turns, with a period that would always meet the first."""

    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.heads, self.turn = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)]), 0

        def forward(self, x: Tensor) -> Tensor:
            self.turn += 1
            return self.heads[self.turn % 2](x)

    model, loss_fn = Heads(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, factor_update_period=2)
    batch = torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    for _ in range(100):
        train_step(model, loss_fn, opt, batch)
    assert min(updates(opt)) > 20


@pytest.mark.parametrize("steps", [0, 5])
def test_a_step_on_another_loss_is_refused_when_factors_are_due(steps: int) -> None:
    model = conv_net()
    opt = trained(model, model, {"lr": 0.1, "adaptive": False}, steps)
    x, y = image_batch()
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"saw none whose gradient.*optimizer.observe"):
        opt.step()


def test_the_preconditioner_refuses_what_it_did_not_see() -> None:
    model, loss_fn = Checkpointed(reentrant=True), nn.CrossEntropyLoss()
    preconditioner = KFACPreconditioner(model, loss_fn)
    x, y = image_batch()
    loss_fn(model(x), y).backward()
    before = model.net[5].weight.grad.clone()
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        preconditioner.step()
    assert torch.equal(before, model.net[5].weight.grad)


@pytest.mark.parametrize("options", MODES)
def test_several_forward_passes_before_their_losses(options: dict[str, Any]) -> None:
    """Losses of two passes, backpropagated together or apart, are one step's two batches."""
    x, y = image_batch()
    found = []
    for together in (True, False):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, fisher="exact", **options)
        for _ in range(3):
            opt.zero_grad()
            if together:
                first, second = model(x[:6]), model(x[6:])
                (loss_fn(second, y[6:]) / 2 + loss_fn(first, y[:6]) / 2).backward()
            else:
                (loss_fn(model(x[:6]), y[:6]) / 2).backward()
                (loss_fn(model(x[6:]), y[6:]) / 2).backward()
            opt.step()
        assert updates(opt) == [3, 3, 3]
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("options", MODES)
def test_two_losses_of_one_output(options: dict[str, Any]) -> None:
    x, y = image_batch()
    found = []
    for halves in (True, False):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, fisher="exact", **options)
        for _ in range(3):
            opt.zero_grad()
            output = model(x)
            loss = loss_fn(output, y)
            (loss / 2 + loss_fn(output, y) / 2 if halves else loss).backward()
            opt.step()
        found.append(weights(model))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("with_loss", [False, True])
def test_evaluation_that_records_gradients_stays_bounded(with_loss: bool) -> None:
    gc.collect()
    gc.freeze()  # what other tests left is not counted, nor that it goes meanwhile
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    x, y = image_batch()

    def alive() -> int:
        gc.collect()
        return sum(issubclass(type(o), Tensor) for o in gc.get_objects())

    counts = []
    for passes in (SMALL_CALLS_WITHOUT_LOSS + 2, 20):
        for _ in range(passes):
            output = model(x)
            if with_loss:
                loss_fn(output, y)
        counts.append(alive())
    gc.unfreeze()
    assert counts[0] == counts[1]
    train_step(model, loss_fn, opt, (x, y))
    assert updates(opt) == [1, 1, 1]

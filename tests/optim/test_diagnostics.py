"""KFAC: statistics by layer, and what steps do not wait for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-9, "atol": 1e-11}
MODES: list[dict[str, Any]] = [
    {},
    {"inverse": "exact"},
    {"lr": 0.1, "adaptive": False, "weight_decay": 0.1},
    {"lr": 0.1, "adaptive": False, "nesterov": True, "inverse": "ekfac"},
]


class Lists(TorchFunctionMode):
    """Counts the tensors that become lists, for which the processor starts no operation."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is Tensor.tolist
        return func(*args, **(kwargs or {}))


class Waits(TorchDispatchMode):
    """Counts what a host would wait for if the tensors were a GPU's, but for lists."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        name = str(function)
        self.count += name.startswith(("aten._local_scalar_dense", "aten.nonzero", "aten.equal"))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("fallback", ["adam", "gradient"])
@pytest.mark.parametrize("inverse", ["factored", "exact", "ekfac"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_ordinary_steps_wait_for_one_number(nesterov: bool, inverse: Any, fallback: Any) -> None:
    """It tells whether everything is finite."""
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(
        model, loss_fn, lr=0.01, adaptive=False, weight_decay=0.1, inverse=inverse,
        nesterov=nesterov, fallback=fallback, max_step_norm=1.0,
    )  # fmt: skip
    opt._preconditioner.steps = 10000
    for _ in range(2):
        train_step(model, loss_fn, opt, image_batch())
    opt.zero_grad()
    with Waits() as waits, Lists() as lists:
        loss_fn(model(image_batch()[0]), image_batch()[1]).backward()
        assert waits.count + lists.count == 0
        opt.step()
    assert waits.count + lists.count == 1
    assert not opt._preconditioner.collector.due  # it was an ordinary step
    with Waits() as waits:
        opt.statistics()
    assert waits.count > 0


@pytest.mark.parametrize("options", MODES)
def test_statistics_by_layer(options: dict[str, Any]) -> None:
    model, loss_fn = conv_net(random_layers=True), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, **options)
    for seed in range(3):
        before = dict(zip(opt._names.values(), [p.detach().clone() for p in opt._names]))
        train_step(model, loss_fn, opt, image_batch(seed=seed))
    gradient = {name: p.grad.clone() for p, name in opt._names.items()}
    opt.zero_grad()
    found = opt.layer_statistics()
    decay = options.get("weight_decay", 0.0)
    assert found.keys() == {"0", "1", "4", "8"}

    def norm(tensors: list[Tensor]) -> float:
        return float(torch.cat([t.detach().flatten() for t in tensors]).norm())

    for name, layer in found.items():
        own = [f"{name}.weight", f"{name}.bias"]
        new = [model.get_parameter(n) for n in own]
        assert layer["parameter_norm"] == pytest.approx(norm(new))
        moved = [p - before[n] for n, p in zip(own, new)]
        assert layer["update_norm"] == pytest.approx(norm(moved))
        expected = norm([gradient[n] + decay * before[n] for n in own])
        assert layer["gradient_norm"] == pytest.approx(expected)
        assert layer["damping"] > 0
        assert layer["condition_a"] >= 1
        assert layer["condition_b"] >= 1
        assert layer["factor_seconds"] > 0
        assert layer["inverse_seconds"] > 0
        assert layer["cholesky_retries"] == 0
        assert ("clip" in layer) == (not options.get("adaptive", True))
        assert ("gain" in layer) == options.get("adaptive", True)
    if options.get("adaptive", True):
        gains = opt._step._slow.gains.by_layer
        assert all(layer["gain"] == gains[name] for name, layer in found.items())
        assert opt.statistics()["gain"] == pytest.approx(sum(gains.values()) / len(gains))


def test_condition_numbers_are_those_of_the_factors() -> None:
    for inverse in ("factored", "exact"):
        model, loss_fn = conv_net(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, lr=0.1, adaptive=False, damping=0.2, inverse=inverse)  # type: ignore[arg-type]
        train_step(model, loss_fn, opt, image_batch())
        for name, layer in opt.layer_statistics().items():
            running = opt._preconditioner.layers[name]
            for factor, letter in zip(running.factors, "ab"):
                if inverse == "exact":
                    expected = max(torch.linalg.cond(own, 2) for own in factor)
                    if expected > 1e10:
                        continue  # singular up to rounding
                else:
                    inverses = getattr(running.inverse, letter)
                    expected = max(torch.linalg.cond(own, 1) for own in inverses)
                assert layer[f"condition_{letter}"] == pytest.approx(float(expected), rel=1e-6)


def test_a_step_that_is_undone_moves_nothing() -> None:
    model, loss_fn = conv_net(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    assert opt.statistics() == {"cholesky_retries": 0.0}
    assert all(layer["update_norm"] == 0 for layer in opt.layer_statistics().values())
    for _ in range(2):
        train_step(model, loss_fn, opt, image_batch())
    before = weights(model)
    (100 * loss_fn(model(image_batch()[0]), image_batch()[1])).backward()
    opt.step()
    assert opt.statistics()["rejected"] == 1
    assert not torch.equal(before, weights(model))
    assert all(layer["update_norm"] == 0 for layer in opt.layer_statistics().values())

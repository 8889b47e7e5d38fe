"""Jacobian products in forward mode and by two backward passes against ``torch.func``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fresh_interpreter import printed
from optim_cases import conv_net, image_batch, train_step, weights
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, jvp

from einconv_kfac import KFAC
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.jvp import forward_products
from einconv_kfac.optim.replay.replay import Replay

EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Cube(torch.autograd.Function):
    """A function without forward mode."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * gradient


class CubeOnce(Cube):
    """A function that declares that it can be differentiated once."""

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Cube.backward(ctx, gradient)


class CubeDetached(Cube):
    """A function whose backward pass silently loses its graph."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return Cube.backward(ctx, gradient.detach())


class Cubes(nn.Module):
    """Cubes, by a function or by torch."""

    def __init__(self, function: type[torch.autograd.Function] | None) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return x**3 if self.function is None else self.function.apply(x)


def net(function: type[torch.autograd.Function] | None) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 4), Cubes(function), nn.Linear(4, 3)).double()


def recorded(model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Replay, Batch]:
    loss_fn = nn.CrossEntropyLoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    loss_fn(model(batch[0]), batch[1]).backward()
    return Replay(model, recorder.paused), recorder.take()[0]


def directions(model: nn.Module, count: int = 2) -> list[dict[str, Tensor]]:
    return [{n: torch.randn_like(p) for n, p in model.named_parameters()} for _ in range(count)]


def expected_products(
    model: nn.Module, x: Tensor, chosen: list[dict[str, Tensor]], state: Tensor
) -> list[Tensor]:
    def output(values: dict[str, Tensor]) -> Tensor:
        torch.set_rng_state(state)
        buffers = {n: b.clone() for n, b in model.named_buffers()}
        return functional_call(model, {**buffers, **values}, (x,))

    point = {n: p.detach() for n, p in model.named_parameters()}
    return [jvp(output, ({n: point[n] for n in d},), (d,))[1] for d in chosen]


@pytest.mark.parametrize("forward_mode", [True, False])
@pytest.mark.parametrize("random_layers", [False, True])
def test_both_ways_are_torchs(forward_mode: bool, random_layers: bool) -> None:
    model, (x, y) = conv_net(random_layers=random_layers), image_batch()
    chosen = directions(model)
    del chosen[1]["0.weight"]
    state = torch.get_rng_state()
    replay, batch = recorded(model, (x, y))
    replay.forward_mode = forward_mode
    before = torch.get_rng_state()
    found = replay.jacobian_products(batch, dict(model.named_parameters()), chosen)
    assert torch.equal(before, torch.get_rng_state())
    for (a,), b in zip(found, expected_products(model, x, chosen, state)):
        assert not a.requires_grad
        torch.testing.assert_close(a, b, **EXACT)


def test_a_function_without_forward_mode() -> None:
    """Forward mode is given up for good; the products are those of the same function with one."""
    model, batch = net(Cube), image_batch()
    replay, seen = recorded(model, batch)
    chosen = directions(model)
    found = replay.jacobian_products(seen, dict(model.named_parameters()), chosen)
    assert not replay.forward_mode
    wanted = expected_products(net(None), batch[0], chosen, torch.get_rng_state())
    for (a,), b in zip(found, wanted):
        torch.testing.assert_close(a, b, **EXACT)


def test_training_without_forward_mode_is_training_with_it() -> None:
    models, loss_fn = (net(None), net(Cube)), nn.CrossEntropyLoss()
    for model in models:
        opt = KFAC(model, loss_fn)
        for seed in range(4):
            train_step(model, loss_fn, opt, image_batch(seed=seed))
    torch.testing.assert_close(*map(weights, models), rtol=1e-8, atol=1e-10)


def test_functions_with_a_jvp_are_not_named() -> None:
    function = type("Forward", (Cube,), {"jvp": staticmethod(lambda ctx, tangent: tangent)})
    model, loss_fn = net(CubeOnce), nn.CrossEntropyLoss()
    model.append(Cubes(function))
    with pytest.raises(RuntimeError, match="Give `CubeOnce` a `jvp`"):
        train_step(model, loss_fn, KFAC(model, loss_fn), image_batch())


@pytest.mark.parametrize("function", [CubeOnce, CubeDetached])
@pytest.mark.parametrize("damping", [None, 0.1])
def test_what_cannot_be_differentiated_twice_is_refused(function: Any, damping: Any) -> None:
    model, loss_fn = net(function), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn, damping=damping)
    before = weights(model)
    with pytest.raises(
        RuntimeError, match=f"differentiated: .*[^.]. Give `{function.__name__}` a `jvp`"
    ):
        train_step(model, loss_fn, opt, image_batch())
    assert torch.equal(before, weights(model))
    assert all(r["factors"] is None for r in opt._preconditioner.state_dict()["layers"].values())
    opt = KFAC(model, loss_fn, lr=0.1, adaptive=False)
    train_step(model, loss_fn, opt, image_batch())


def test_a_direction_that_the_output_does_not_depend_on() -> None:
    model = net(Cube)
    replay, batch = recorded(model, image_batch())
    replay.forward_mode = False
    zero = [{n: torch.zeros_like(p) for n, p in model.named_parameters()}, {}]
    for (product,) in replay.jacobian_products(batch, dict(model.named_parameters()), zero):
        assert not product.any()


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_recurrent_layers_in_float32(kind: Any) -> None:
    """Torch's fast implementations have no forward mode."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer, self.head = kind(4, 5, 2, batch_first=True, dropout=0.5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(x)[0][:, -1])

    model = Recurrent()
    x, y = torch.randn(6, 3, 4), torch.arange(6) % 3
    chosen = directions(model)
    state = torch.get_rng_state()
    replay, batch = recorded(model, (x, y))
    point = dict(model.named_parameters())
    found = replay.jacobian_products(batch, point, chosen)
    assert replay.forward_mode
    replay.forward_mode = False
    again = replay.jacobian_products(batch, point, chosen)
    precise = [{n: t.double() for n, t in d.items()} for d in chosen]
    assert "forward" not in vars(model.layer)
    model.layer.dropout = 0.5
    wanted = expected_products(model.double(), x.double(), precise, state)
    for (a,), (b,), c in zip(found, again, wanted):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(a.double(), c, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("forward_mode", [True, False])
def test_a_model_that_does_not_repeat_itself_is_refused(forward_mode: bool) -> None:
    class Private(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.generator = conv_net(), torch.Generator().manual_seed(0)

        def forward(self, x: Tensor) -> Tensor:
            noise = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
            return self.net(x + noise)

    model, loss_fn = Private(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    opt._preconditioner.replay.forward_mode = forward_mode
    before = weights(model)
    with pytest.raises(RuntimeError, match="must repeat its output"):
        train_step(model, loss_fn, opt, image_batch())
    assert torch.equal(before, weights(model))


def test_first_step_compiles_nothing() -> None:
    """Torch's own `make_dual` compiles formulas of operators that hardly any model has."""
    script = """
import sys, torch
from torch import nn
from einconv_kfac import KFAC
model, loss_fn = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), nn.CrossEntropyLoss()
opt = KFAC(model, loss_fn)
loss_fn(model(torch.eye(4)), torch.tensor([0, 1, 0, 1])).backward()
opt.step()
print([name for name in sys.modules if "decompositions_for_jvp" in name])
"""
    assert printed(script).strip() == "[]"


@pytest.mark.parametrize("is_new", [True, False])
def test_products_are_repeated_where_formulas_were_not_compiled(
    is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[bool] = []

    def load() -> bool:
        loaded.append(is_new and not loaded)
        return loaded[-1]

    def function(values: dict[str, Tensor]) -> tuple[Tensor, ...]:
        if not any(loaded):
            raise NotImplementedError("Trying to use forward AD with an operator.")
        return (values["w"] ** 2,)

    monkeypatch.setattr("einconv_kfac.optim.replay.jvp.load_forward_mode", load)
    point, direction = {"w": torch.tensor([3.0])}, {"w": torch.tensor([2.0])}
    if is_new:
        _, [(product,)] = forward_products(function, point, [direction])
        assert product.item() == 12
    else:
        with pytest.raises(NotImplementedError):
            forward_products(function, point, [direction])
    assert len(loaded) == 1

"""Functions that replays with tangents differentiate themselves, against torch's forward mode."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from python_operations import python_operations_noted
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn import functional

from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay

C = torch.linspace(0.5, 2, 12, dtype=torch.float64).reshape(4, 3)
Operation = Callable[[Tensor], Tensor]


def in_place_after(y: Tensor) -> Tensor:
    """The tangent of a sum that is overwritten is not that of its operand."""
    z = y + 1.0
    z *= 3.0
    return z + y


def dropped(y: Tensor) -> Tensor:
    torch.manual_seed(1)
    y = functional.dropout(y, 0.4, training=True)
    return functional.dropout1d(y.unsqueeze(0), 0.3).squeeze(0) - 3 * functional.dropout(y, 0.0)


def other_dropout(y: Tensor) -> Tensor:
    torch.manual_seed(1)
    y = functional.dropout(y, training=False) + functional.dropout(2 * y, 0.4, inplace=True)
    return functional.alpha_dropout(y, 0.3, training=True) + functional.dropout(y, 1.0)


def normalized(y: Tensor) -> Tensor:
    y = functional.layer_norm(y, (3,)) * y
    y = functional.layer_norm(y, [3], C[0], eps=0.1) + y
    return functional.layer_norm(y.unflatten(0, (2, 2)), (2, 3), y[:2], 2 * y[2:]).flatten(0, 1)


OPERATIONS: dict[str, Operation] = {
    "sums": lambda y: (y + C) + (C + y) + torch.add(y, 2) + (1 + y),
    "differences": lambda y: (y - C) * (C - y) * (1 - y) * (y - 3) * torch.sub(C, y),
    "products": lambda y: (y * C) * (C * y) + torch.mul(2, y) + y.mul(True) + (0.5 * y),
    "quotients": lambda y: y / C + C / (3 + y.square()) + 2 / (2 + y.square()) + torch.div(y, 3),
    "multiples of addends": lambda y: y.add(C, alpha=2) - torch.sub(C, y, alpha=3),
    "rounded quotients": lambda y: y * torch.div(y, 0.1, rounding_mode="floor"),
    "reversed": lambda y: torch.rsub(y, 2) * torch.rsub(y, C, alpha=3),
    "broadcast": lambda y: y[:1] * C + C[0] / (2 + y[:, :1].square()) - C[:, :1] - y[0],
    "numbers": lambda y: y.sum() * C - 2 * y.mean() + torch.tensor(3.0) * y,
    "other types": lambda y: (y.float() * C + y.float() * torch.tensor(2, dtype=torch.int64)) * 2j,
    "in place": in_place_after,
    "dropout": dropped,
    "other dropout": other_dropout,
    "layer norm": normalized,
    "both": lambda y: (y + y) * (y - 2 * y) / (2 + y * y),
    "parameters": lambda y: y * nn.Parameter(C) + nn.Parameter(C[0]),
    "whole numbers": lambda y: y * torch.arange(3) - (torch.arange(3) > 1) * y,
}
DIRECT = ("sums", "differences", "products", "quotients", "broadcast", "dropout", "layer norm")


class Net(nn.Module):
    """A linear layer and an operation."""

    def __init__(self, operation: Operation) -> None:
        super().__init__()
        self.layer, self.operation = nn.Linear(2, 3), operation

    def forward(self, x: Tensor) -> Tensor:
        y = self.operation(self.layer(x))
        return (y.real + y.imag if y.is_complex() else y) + y.real.square()


def recorded(model: nn.Module) -> tuple[Batch, Replay, Tensor]:
    x, loss_fn = torch.randn(4, 2, dtype=torch.float64), nn.MSELoss()
    recorder = Recorder(model, loss_fn, lambda *_: None)
    recorder.keeps_outputs = True
    y = model(x)
    loss_fn(y, torch.zeros_like(y)).backward()
    (batch,) = recorder.take()
    return batch, Replay(model, recorder.paused), x


@pytest.mark.parametrize("name", OPERATIONS)
def test_products_are_those_of_torch(name: str) -> None:
    torch.manual_seed(0)
    model = Net(OPERATIONS[name]).double()
    batch, replay, x = recorded(model)
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    tangent = {n: torch.randn_like(p) for n, p in point.items()}
    _, expected = jvp(lambda own: functional_call(model, own, (x,)), (point,), (tangent,))
    ((found,),) = replay.jacobian_products(batch, point, [tangent])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert replay.forward_mode


@pytest.mark.parametrize("name", DIRECT)
def test_take_no_detour_through_operations_in_python(name: str) -> None:
    model = Net(OPERATIONS[name]).double()
    batch, replay, _ = recorded(model)
    point = {n: p.detach().clone() for n, p in model.named_parameters()}
    replay.jacobian_products(batch, point, [point])  # what is imported on first use is
    with python_operations_noted() as called:
        replay.jacobian_products(batch, point, [point])
    assert not called

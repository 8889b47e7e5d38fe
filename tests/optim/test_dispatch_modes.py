"""Steps inside of modes of torch that see each operation."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_cases import image_batch, weights
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from einconv_kfac import KFAC


class Recurrent(nn.Module):
    """A network whose batches agree, so that the objective is compared after the slow momentum."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.lstm, self.head = nn.LSTM(6, 4, batch_first=True), nn.Linear(4, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.lstm(x[:, 0, :3])[0][:, -1])
        return out


MODES: list[dict[str, Any]] = [
    {},
    {"safeguard": True},
    {"weight_decay": 0.01, "decoupled_weight_decay": True},
    {"inverse": "exact", "lr": 0.5},
    {"adaptive": False, "lr": 0.1, "nesterov": True},
]


@pytest.mark.parametrize("turn", range(len(MODES)), ids=lambda turn: str(MODES[turn]))
def test_a_step_inside_of_a_flop_counter_is_the_same(turn: int) -> None:
    """Every second step is counted, from the first or the second one on in turn."""
    found = []
    for is_counted in (False, True):
        model, loss_fn = Recurrent(), nn.CrossEntropyLoss()
        opt = KFAC(model, loss_fn, **MODES[turn])
        for step in range(6):
            opt.zero_grad()
            x, y = image_batch()
            loss_fn(model(x), y).backward()
            counts = is_counted and (step + turn) % 2 == 0
            with FlopCounterMode(display=False) if counts else nullcontext():
                opt.step()
        found.append(weights(model))
    assert torch.equal(*found)


class _OutOfMemoryMode(TorchDispatchMode):
    """Raises an error at an operation, by its number; counts them."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if self.count == self.number:
            raise torch.OutOfMemoryError("no memory is left")
        return function(*args, **(kwargs or {}))


def focal(out: Tensor, y: Tensor) -> Tensor:
    """A loss whose curvature is a Hessian."""
    each = functional.cross_entropy(out, y, reduction="none")
    return ((1 - (-each).exp()).square() * each).mean()


def stepped(opt: KFAC, loss: Tensor) -> None:
    loss.backward()
    opt.step()


def test_no_operation_hides_that_memory_is_short() -> None:
    def begun() -> tuple[nn.Module, KFAC, Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        opt = KFAC(model, fisher="exact")
        x, y = image_batch()
        return model, opt, opt.observe(focal(model(x), y))

    _, opt, loss = begun()
    with _OutOfMemoryMode(0) as mode:
        stepped(opt, loss)
    last = mode.count - 1  # then the step is taken, and the end of its record is left
    for number in range(1, last, last // 45):
        model, opt, loss = begun()
        before = weights(model)
        with pytest.raises(torch.OutOfMemoryError, match="no memory"), _OutOfMemoryMode(number):
            stepped(opt, loss)
        assert torch.equal(before, weights(model))

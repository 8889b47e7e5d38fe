"""Calls of a model whose arguments depend on its earlier calls, beside one call that holds all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.optim import KFAC

Loss = Callable[[nn.Module, Any, Tensor, Tensor], Tensor]
"""Returns the loss of a batch for a model and the function that calls it."""


class Cell(nn.Module):
    """A recurrent cell with an output."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        state = self.cell(x, state)
        return self.out(state), state


class Long(Cell):
    """The same with torch's function for a long short-term memory, which has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6)

    def forward(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        y, state = self.cell(x[None], state)
        return self.out(y[0]), state


class Mixer(nn.Module):
    """A network from four features to four, and a parameter that scripts use."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def loop(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """One loss over all steps of a recurrent loop."""
    state, outputs = torch.zeros(len(x), 6).to(x), []
    for step in range(3):
        out, state = call(x + step, state)
        outputs.append(out)
    return functional.cross_entropy(torch.stack(outputs).mean(0), y % 3)


def long_loop(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """The same with a nested state."""
    state, total = (torch.zeros(1, len(x), 6).to(x), torch.zeros(1, len(x), 6).to(x)), 0.0
    for step in range(3):
        out, state = call(x + step, state)
        total = total + functional.cross_entropy(out, y % 3)
    return torch.as_tensor(total)


def twice(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """A network that is applied to its own output."""
    return functional.mse_loss(call(call(x)), x.flip(0))


def bent(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """Operations between the calls, and an output that is used in two ways."""
    first = call(x + model.shift)
    second = call(torch.cat([first[:, :2].sigmoid(), (first[:, 2:] * first[:, :2]).exp()], 1) * 0.5)
    return functional.mse_loss(second, x.flip(0)) + 0.1 * first.square().mean()


class Remembering(Cell):
    """A cell that keeps its state in a buffer."""

    state: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("state", torch.zeros(8, 6))

    def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
        self.state = self.cell(x, self.state)
        return self.out(self.state)


class Remembered(nn.Module):
    """Two parts, the first of which keeps its state, and the second of which is called alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = Remembering(), nn.Linear(3, 3)


def remembered(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """A loop whose state the model keeps."""
    model.state = torch.zeros(8, 6).to(x)
    outputs = [call(x + step) for step in range(3)]
    return functional.cross_entropy(torch.stack(outputs).mean(0), y % 3)


def decaying(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """The same, where the script changes the state between the calls and uses it."""
    model.state, outputs = torch.zeros(8, 6).to(x), []
    for step in range(3):
        outputs.append(call(x + step))
        model.state = model.state.sigmoid() * 0.5
    penalty = 0.1 * model.state.square().mean()
    return functional.cross_entropy(torch.stack(outputs).mean(0), y % 3) + penalty


def in_parts(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """A part that keeps its state, and one that comes after it."""
    model.first.state = torch.zeros(8, 6).to(x)
    hidden = torch.stack([model.first(x + step) for step in range(3)]).mean(0)
    return functional.cross_entropy(model.head(hidden), y % 3)


def trained(kind: type[nn.Module], loss: Loss, *, whole: bool, **options: Any) -> list[Tensor]:
    """Train, and return the parameters.

    Args:
        kind: The model.
        loss: The loss.
        whole: Whether one call of a module holds all.
    """
    torch.manual_seed(0)
    model = kind().double()

    class Whole(nn.Module):
        """The model and the script."""

        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": loss(model, model.__call__, x, y)}

    opt = KFAC(Whole() if whole else model, **options)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 4, generator=generator).double()
        y = torch.randint(3, (8,), generator=generator)
        opt.zero_grad()
        if whole:
            opt._preconditioner.model(x, y)["loss"].backward()
        else:
            opt.observe(loss(model, model, x, y)).backward()
        opt.step()
    return [parameter.detach() for parameter in model.parameters()]


CASES: list[tuple[type[nn.Module], Loss]] = [
    (Cell, loop),
    (Long, long_loop),
    (Mixer, twice),
    (Mixer, bent),
    (Remembering, remembered),
    (Remembering, decaying),
    (Remembered, in_parts),
]


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
@pytest.mark.parametrize(("kind", "loss"), CASES)
@pytest.mark.parametrize("options", [{}, {"safeguard": True}])
def test_steps_are_those_of_one_call(
    kind: type[nn.Module], loss: Loss, options: dict[str, Any]
) -> None:
    got = trained(kind, loss, whole=False, fisher="exact", **options)
    for one, other in zip(got, trained(kind, loss, whole=True, fisher="exact", **options)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


class Counted(Cell):
    """A cell that counts its calls."""

    calls = 0

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        Counted.calls += 1
        return super().forward(x, state)


def with_losses_of_steps(*, whole: bool) -> tuple[list[Tensor], int]:
    """Train without factors, with a loss in each step; return parameters and number of calls.

    Args:
        whole: Whether the sum is observed as one loss.
    """
    torch.manual_seed(0)
    model, Counted.calls = Counted().double(), 0
    loss_fn = nn.CrossEntropyLoss()
    opt = KFAC(model, None if whole else loss_fn, exclude=["cell", "out"])
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 8, 4, generator=generator).double()
        y = torch.randint(3, (4, 8), generator=generator)
        opt.zero_grad()
        state, total = torch.zeros(8, 6).double(), torch.zeros(()).double()
        for own, target in zip(x, y):
            out, state = model(own, state)
            total = total + loss_fn(out, target)
        (opt.observe(total) if whole else total).backward()
        opt.step()
    return [parameter.detach() for parameter in model.parameters()], Counted.calls


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
def test_losses_of_steps_are_replayed_together() -> None:
    (one, few), (other, many) = (with_losses_of_steps(whole=whole) for whole in (False, True))
    assert few == many
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


class Autoencoder(nn.Module):
    """Two networks that scripts call one after the other; there is no whole."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4))
        self.decoder = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 4))
        self.decoder[2].bias = self.encoder[2].bias  # shared between the parts


def coded(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """A variational autoencoder, as tutorials write it."""
    mean, log_variance = model.encoder(x).chunk(2, 1)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    latent = mean + noise * (log_variance / 2).exp()
    divergence = -(1 + log_variance - mean.square() - log_variance.exp()).sum(1).mean() / 2
    return functional.mse_loss(model.decoder(latent), x) + 0.1 * divergence


class Parts(nn.Module):
    """Layers that scripts call one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(4, 4) for _ in range(3))
        self.classes, self.value = nn.Linear(4, 3), nn.Linear(4, 4)


def layers(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """Layers one after the other; no output outlives the next call."""
    hidden = model.third(model.second(model.first(x).tanh()).relu()).sigmoid()
    return functional.cross_entropy(model.classes(hidden), y)


def heads(model: Any, call: Any, x: Tensor, y: Tensor) -> Tensor:
    """Two heads on features that two calls computed."""
    features = model.second(model.first(x).relu()).tanh()
    loss = functional.cross_entropy(model.classes(features), y)
    return loss + 0.1 * functional.mse_loss(model.value(features), x)


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
@pytest.mark.parametrize("loss", [layers, heads])
@pytest.mark.parametrize("options", [{}, {"safeguard": True}, {"adaptive": False, "lr": 0.1}])
def test_outputs_that_do_not_outlive_the_next_call(loss: Loss, options: dict[str, Any]) -> None:
    got = trained(Parts, loss, whole=False, fisher="exact", **options)
    for one, other in zip(got, trained(Parts, loss, whole=True, fisher="exact", **options)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
@pytest.mark.parametrize("options", [{}, {"adaptive": False, "lr": 0.1}])
def test_scripts_that_call_parts_of_a_model(options: dict[str, Any]) -> None:
    got = trained(Autoencoder, coded, whole=False, fisher="exact", **options)
    for one, other in zip(got, trained(Autoencoder, coded, whole=True, fisher="exact", **options)):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_a_call_that_fails_leaves_nothing_behind() -> None:
    model = Autoencoder()
    opt = KFAC(model)
    with pytest.raises(RuntimeError):
        model.encoder(torch.zeros(2, 3))
    before = model.encoder[0].weight.detach().clone()
    opt.observe(coded(model, None, torch.randn(8, 4), torch.zeros(8))).backward()
    opt.step()
    assert not torch.equal(before, model.encoder[0].weight)

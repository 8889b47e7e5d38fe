"""The change of an objective that uses parameters itself, beside the model's outputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from einconv_kfac import KFAC


class Scaled(nn.Module):
    """A perceptron with a scale, a matrix and prototypes that scripts use themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.scale = nn.Parameter(torch.ones(()))
        self.matrix = nn.Parameter(torch.randn(3, 30_000) / 60)
        self.prototypes = nn.Parameter(torch.randn(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.last(self.first(x).tanh())
        return scores


class Prototypes(nn.Module):
    """A model that returns a parameter, or a view of it."""

    def __init__(self, *, is_view: bool) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.randn(20, 3)), nn.Linear(3, 3)
        self.is_view = is_view

    def forward(self) -> tuple[Tensor, Tensor]:
        """Return the parameter and scores."""
        return self.table.view(20, 3) if self.is_view else self.table, self.layer(self.table)


def penalty(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    squares = [parameter.square().sum() for parameter in model.last.parameters()]
    return cross_entropy(model(x), y) + 0.05 * torch.stack(squares).sum()


def temperature(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x) / model.scale, y)


def large_matrix(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy((model(x) @ model.matrix)[:, :4], y)


def shared_weight(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(model(x), y) + (model(x) @ model.last.weight).square().mean()


def prototypes(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    return cross_entropy(4 * normalize(model(x)) @ normalize(model.prototypes).t(), y)


def between_calls(model: Scaled, x: Tensor, y: Tensor) -> Tensor:
    hidden = model.first(x).tanh() @ model.last.weight.t()
    return cross_entropy(model.last((hidden * model.scale) @ model.last.weight), y)


LOSSES = (penalty, temperature, large_matrix, shared_weight, prototypes, between_calls)


def changes(
    model: nn.Module, loss: Callable[[], Tensor], *, steps: int = 2
) -> list[tuple[float, float]]:
    """Return how the loss changed in each step, and the change that the step went by."""
    logged: list[dict[str, float]] = []
    optimizer = KFAC(model, momentum=0.0, log_to=lambda _, values: logged.append(dict(values)))
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        before = optimizer.observe(loss())
        before.backward()
        optimizer.step()
        true = (loss() - before).item()
        found.append((true, logged[-1]["ratio"] * logged[-1]["predicted"]))
    return found


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
@pytest.mark.parametrize("loss", LOSSES)
def test_parameters_in_a_loss_change_with_the_step(
    loss: Callable[[Scaled, Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    model, x, y = Scaled().double(), torch.randn(20, 6).double(), torch.randint(3, (20,))
    for true, found in changes(model, lambda: loss(model, x, y)):
        assert found == pytest.approx(true, rel=1e-8)


@pytest.mark.filterwarnings("ignore:Kronecker factors cover")
@pytest.mark.parametrize("is_view", [False, True])
def test_a_parameter_that_the_model_returns_changes_with_the_step(is_view: bool) -> None:
    torch.manual_seed(0)
    model, y = Prototypes(is_view=is_view).double(), torch.randint(3, (20,))

    def loss() -> Tensor:
        table, scores = model()
        return cross_entropy(table, y) + scores.square().mean()

    for true, found in changes(model, loss):
        assert found == pytest.approx(true, rel=1e-8)

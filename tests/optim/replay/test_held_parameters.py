"""Models that reach their parameters in other ways than as attributes of their modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(24, 5, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(24, 3, generator=GENERATOR, dtype=torch.float64)


class Plain(nn.Module):
    """A cell with two weights, and a linear layer after it."""

    def __init__(self) -> None:
        super().__init__()
        start = torch.linspace(-1, 1, 20, dtype=torch.float64).reshape(4, 5)
        self.inner, self.gate = nn.Parameter(start), nn.Parameter(start.flip(0).cos())
        self.head = nn.Linear(4, 3, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(start[:3, :4])
            self.head.bias.zero_()

    def weights(self) -> tuple[Tensor, Tensor]:
        """Return the weights of the cell."""
        return self.inner, self.gate

    def forward(self, x: Tensor) -> Tensor:
        inner, gate = self.weights()
        output: Tensor = self.head(torch.tanh(x @ inner.T) * torch.sigmoid(x @ gate.T))
        return output


class InMapping(Plain):
    """The same, which reads the weights from a mapping and a list inside of it."""

    def __init__(self) -> None:
        super().__init__()
        self.own: dict[str, Any] = {"inner": self.inner, "others": [("gate", self.gate)]}

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.own["inner"], self.own["others"][0][1]


class InAttribute(Plain):
    """The same, with the weights in attributes that are not registered."""

    def __init__(self) -> None:
        super().__init__()
        vars(self)["first"], vars(self)["second"] = self.inner, self.gate

    def weights(self) -> tuple[Tensor, Tensor]:
        return vars(self)["first"], vars(self)["second"]


class InClosure(Plain):
    """The same, with the weights in a function."""

    def __init__(self) -> None:
        super().__init__()
        inner, gate = self.inner, self.gate
        self.read: Callable[[], tuple[Tensor, Tensor]] = lambda: (inner, gate)

    def weights(self) -> tuple[Tensor, Tensor]:
        return self.read()


def trained(kind: type[Plain]) -> tuple[list[float], dict[str, Tensor]]:
    """Return the losses of a few steps, and the parameters after them."""
    model = kind()
    optimizer, losses = KFAC(model), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = optimizer.observe(functional.mse_loss(model(X), Y))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, dict(model.named_parameters())


@pytest.mark.parametrize("kind", [InMapping, InAttribute])
def test_parameters_in_attributes_take_other_values(kind: type[Plain]) -> None:
    """Steps are those of the model that reads its parameters from its modules."""
    losses, parameters = trained(kind)
    expected_losses, expected = trained(Plain)
    torch.testing.assert_close(losses, expected_losses)
    torch.testing.assert_close(parameters, expected)


def test_attributes_are_restored() -> None:
    """After a step, the attributes are what they were, and hold the parameters."""
    model = InMapping()
    own, others = model.own, model.own["others"]
    optimizer = KFAC(model)
    optimizer.observe(functional.mse_loss(model(X), Y)).backward()
    optimizer.step()
    assert model.own is own
    assert own["others"] is others
    assert own["inner"] is model.inner
    assert others[0][1] is model.gate


def test_parameters_in_closures_are_refused() -> None:
    """A replay cannot give them other values, and says so before anything is changed."""
    model = InClosure()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = KFAC(model)
    optimizer.observe(functional.mse_loss(model(X), Y)).backward()
    with pytest.raises(RuntimeError, match="got 'gate', which it also reaches in another way"):
        optimizer.step()
    for parameter, value in zip(model.parameters(), before):
        torch.testing.assert_close(parameter.detach(), value, rtol=0, atol=0)

"""Layers up to the last recurrent one, whose factors may be off, have their own coefficient."""

from __future__ import annotations

import pytest
import torch
from optim_cases import train_step, weights
from torch import Tensor, nn

from einconv_kfac import KFAC

EXACT = {"rtol": 1e-7, "atol": 1e-9}
DAMPING = 5.0


class Reader(nn.Module):
    """A linear layer, a recurrent one over the steps, and a linear one on its last state."""

    def __init__(self, recurrent: nn.Module) -> None:
        super().__init__()
        self.first, self.recurrent, self.head = nn.Linear(2, 3), recurrent, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if isinstance(self.recurrent, nn.RNNCellBase):
            state = None
            for step in x.unbind(1):
                state = self.recurrent(step, state)
            found: Tensor = self.head(state)
            return found
        return self.head(self.recurrent(x)[0][:, -1])


def dense_ggn(model: nn.Module, loss_fn: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return ``J^T H J``, row after row of the Jacobian."""
    output = model(x)
    parameters = [*model.parameters()]
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(each, parameters, retain_graph=True)])
        for each in output.flatten()
    ]
    hessian = torch.autograd.functional.hessian(lambda out: loss_fn(out, y), output.detach())
    jacobian = torch.stack(rows)
    return jacobian.T @ hessian.reshape(len(rows), len(rows)) @ jacobian


@pytest.mark.parametrize(
    "recurrent",
    [
        lambda: nn.LSTM(3, 4, batch_first=True),
        lambda: nn.GRU(3, 2, batch_first=True, bidirectional=True),
        lambda: nn.RNNCell(3, 4),
    ],
    ids=["LSTM", "bidirectional GRU", "RNNCell"],
)
def test_the_step_is_the_minimum_over_both_coefficients(recurrent: object) -> None:
    torch.manual_seed(0)
    assert callable(recurrent)
    model, loss_fn = Reader(recurrent()).double(), nn.CrossEntropyLoss()
    x, y = torch.randn(8, 5, 2, dtype=torch.float64), torch.randint(3, (8,))
    ggn, start = dense_ggn(model, loss_fn, x, y), weights(model)
    opt = KFAC(model, loss_fn, damping=DAMPING, fisher="exact", fallback="gradient")
    train_step(model, loss_fn, opt, (x, y))
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    ascent = opt._preconditioner.precondition(gradient)
    is_head = [torch.full_like(p, n.startswith("head")) for n, p in model.named_parameters()]
    head = torch.cat([own.flatten() for own in is_head])
    whole = torch.cat([ascent[name].flatten() for name in gradient])
    directions = torch.stack([head * whole, (1 - head) * whole])
    slope = directions @ torch.cat([own.flatten() for own in gradient.values()])
    matrix = directions @ (ggn + DAMPING * torch.eye(len(ggn)).double()) @ directions.T
    coefficients = torch.linalg.solve(matrix, slope)
    torch.testing.assert_close(weights(model), start - coefficients @ directions, **EXACT)
    assert float(coefficients.max() / coefficients.min()) > 1.1

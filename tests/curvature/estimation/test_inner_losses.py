"""Curvature of losses of tensors inside of the model, against the GGN by its definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.estimation.estimate import Kind

EXAMPLES = 5
X = torch.randn(1, 3, generator=torch.Generator().manual_seed(0)).double().repeat(EXAMPLES, 1)
Y = torch.randn(EXAMPLES, 2, generator=torch.Generator().manual_seed(1)).double()


class Kept(nn.Module):
    """A network that keeps its features and what an auxiliary head makes of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4, bias=False), nn.Linear(4, 2, bias=False)
        self.head = nn.Linear(4, 1, bias=False)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.first(x)
        self.auxiliary = self.head(self.features.tanh())
        return self.last(self.features)


def all_outputs(model: Kept, parameters: dict[str, Tensor]) -> Tensor:
    """The outputs whose halved squares are summed, ``[n, k]``."""
    output = functional_call(model, parameters, (X,))
    return torch.cat([output - Y, 2 * model.features, model.auxiliary], 1)


def loss(model: Kept, output: Tensor) -> Tensor:
    squares = (output - Y).square().sum(1) + 4 * model.features.square().sum(1)
    return (squares + model.auxiliary.square().sum(1)).mean() / 2


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal"])
@pytest.mark.parametrize("hooked", [False, True])
def test_blocks_are_those_of_all_terms(kind: Kind, hooked: bool) -> None:
    model, seen = Kept(), {}
    if hooked:
        model.first.register_forward_hook(lambda *call: seen.update(features=call[2]))

    def total(output: Tensor, _: Tensor) -> Tensor:
        if hooked:
            model.features = seen["features"]
        return loss(model, output)

    found = kronecker_factors(model, total, [(X, Y), (X, Y)], fisher="exact", kind=kind)
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda own: all_outputs(model, own))(parameters)
    for name, rows in jacobians.items():
        flat = rows.reshape(EXAMPLES, rows.shape[1], -1)
        block = torch.einsum("nki,nkj->ij", flat, flat) / EXAMPLES
        if kind == "diagonal":
            block = block.diagonal().diag()
        shape = parameters[name].shape
        zero = {other: torch.zeros_like(p) for other, p in parameters.items()}
        columns = [
            (found @ {**zero, name: unit.reshape(shape)})[name].flatten()
            for unit in torch.eye(len(block)).double()
        ]
        torch.testing.assert_close(torch.stack(columns), block, rtol=1e-9, atol=1e-12)

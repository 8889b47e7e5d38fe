"""Models that the loop maps over examples by `torch.vmap`: refused with a remedy, which trains."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import pytest
import torch
from optim_cases import assert_same, weights
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy

from einconv_kfac import KFAC, KFACPreconditioner, kronecker_factors

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(12, 4, generator=GENERATOR, dtype=torch.float64)
Y = torch.randint(3, (12,), generator=GENERATOR)
MODES: list[dict[str, Any]] = [
    {"fisher": "exact"},
    {"fisher": "exact", "lr": 0.1, "adaptive": False},
    {"fisher": "exact", "inverse": "exact"},
]


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


class Mapped(nn.Module):
    """The remedy of the message: a module whose forward pass maps its model."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = torch.vmap(self.inner)(x)
        return result


def trained(model: nn.Module, options: dict[str, Any], steps: int = 4) -> Tensor:
    opt = KFAC(model, **options)
    for _ in range(steps):
        opt.zero_grad()
        opt.observe(cross_entropy(model(X), Y)).backward()
        opt.step()
    return weights(model)


@pytest.mark.parametrize("options", MODES)
def test_a_mapped_model_is_refused_and_nothing_changes(options: dict[str, Any]) -> None:
    model = network()
    opt = KFAC(model, **options)
    before, state = weights(model), deepcopy(opt.state_dict())
    opt.observe(cross_entropy(torch.vmap(model)(X), Y)).backward()
    said = r"factors of '0', '2' need calls .*called by torch\.vmap.*`forward` of a module that"
    with pytest.raises(RuntimeError, match=said):
        opt.step()
    assert torch.equal(before, weights(model))
    assert_same(state, opt.state_dict())
    opt.zero_grad()
    opt.observe(cross_entropy(model(X), Y)).backward()
    opt.step()
    assert torch.equal(weights(model), trained(network(), options, 1))


def test_a_mapped_model_is_refused_by_a_preconditioner_and_gradients_stay() -> None:
    model = network()
    preconditioner = KFACPreconditioner(model)
    preconditioner.observe(cross_entropy(torch.vmap(model)(X), Y)).backward()
    before = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with pytest.raises(RuntimeError, match=r"called by torch\.vmap"):
        preconditioner.step()
    assert all(map(torch.equal, before, [p.grad for p in model.parameters()]))


@pytest.mark.parametrize("options", MODES)
def test_a_module_that_maps_its_model_trains(options: dict[str, Any]) -> None:
    model = Mapped()
    before = cross_entropy(model(X), Y).item()
    trained(model, options)
    assert cross_entropy(model(X), Y).item() < 0.9 * before


def test_blocks_of_a_module_that_maps_its_model_have_the_traces_of_exact_ones() -> None:
    model = Mapped()
    factors = kronecker_factors(model, cross_entropy, [(X, Y)], fisher="exact")
    values = {name: p.detach() for name, p in model.named_parameters()}
    jacobians = jacrev(lambda own: functional_call(model, own, (X,)))(values)
    scores = model(X).detach().softmax(1)
    hessians = torch.diag_embed(scores) - scores[:, :, None] * scores[:, None, :]
    for layer in ("inner.0", "inner.2"):
        own = [jacobians[f"{layer}.{name}"].flatten(2) for name in ("weight", "bias")]
        rows = torch.cat(own, 2)  # example, class, parameter
        exact = torch.einsum("ncp,ncd,ndp->", rows, hessians, rows) / len(X)
        torch.testing.assert_close(factors[layer].trace(), exact)

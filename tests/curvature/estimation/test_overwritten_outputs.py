"""Outputs of layers that are overwritten in place, which are views where inputs have positions."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from ggn import loss_hessian
from torch import Tensor, nn
from torch.func import functional_call, jacrev
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors
from einconv_kfac.curvature.estimation.estimate import Kind
from einconv_kfac.curvature.factors.approximation import Approximation

Overwrite = Callable[[Tensor, Tensor], Tensor]

OVERWRITES: dict[str, Overwrite] = {
    "relu_": lambda y, _: functional.relu_(y),
    "module": lambda y, _: nn.ELU(inplace=True)(y),
    "add_": lambda y, x: y.add_(x),
    "masked_fill_": lambda y, x: y.masked_fill_(x > 1, 0.0),
    "scaled rows": lambda y, x: y.mul_(2.0)[:, :1].mul_(x[:, :1]),
    "twice": lambda y, x: y.mul_(x).tanh_(),
}


class Block(nn.Module):
    """A linear layer between two others, with an output that may be overwritten."""

    def __init__(self, overwrite: Overwrite, *, copies: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.last = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.overwrite, self.copies = overwrite, copies
        self.double()

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        z = torch.tanh(self.first(x))
        y = self.inner(z) if added is None else self.inner(z) + added
        return self.last(self.overwrite(y.clone() if self.copies else y, z)).sum(1)


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, 3, generator=generator, dtype=torch.float64)
    return x, torch.randn(5, 2, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", OVERWRITES)
def test_factors_are_those_of_the_definition(name: str) -> None:
    x, y = batch()
    model, loss_fn = Block(OVERWRITES[name], copies=False), nn.MSELoss()
    found = kronecker_factors(model, loss_fn, [(x, y)], fisher="exact")["inner"]
    a = functional.pad(torch.tanh(model.first(x)), (0, 1), value=1.0)  # the bias
    other = Block(OVERWRITES[name], copies=True)
    parameters = {key: p.detach() for key, p in other.named_parameters()}

    def output(added: Tensor) -> Tensor:
        result: Tensor = functional_call(other, parameters, (x, added))
        return result.flatten()

    rows = jacrev(output)(torch.zeros(5, 3, 4, dtype=torch.float64))  # [f, n, s, co]
    hessian = loss_hessian(loss_fn, other(x), y)
    definition = torch.einsum("fnsc,fh,hnsd->cd", rows, hessian, rows) / 3
    torch.testing.assert_close(found.A[0], torch.einsum("nsd,nse->de", a, a) / 5)
    torch.testing.assert_close(found.B[0] * found.scale, definition)


KINDS: tuple[Kind, ...] = ("kfac", "ekfac", "diagonal")
APPROXIMATIONS: tuple[Approximation, ...] = ("expand", "reduce")
IN_TURN = [
    (name, kind, APPROXIMATIONS[(i + j) % 2])
    for i, name in enumerate(OVERWRITES)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind", "approximation"), IN_TURN)
def test_blocks_are_those_of_a_copied_output(
    name: str, kind: Kind, approximation: Approximation
) -> None:
    blocks = [
        kronecker_factors(
            Block(OVERWRITES[name], copies=copies),
            nn.MSELoss(),
            [batch()],
            fisher="exact",
            kind=kind,
            approximation=approximation,
        )
        for copies in (False, True)
    ]
    vector = {
        key: torch.ones_like(p)
        for key, p in Block(OVERWRITES[name], copies=True).named_parameters()
    }
    for left, right in zip((blocks[0] @ vector).values(), (blocks[1] @ vector).values()):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("options", [{}, {"lr": 0.1, "adaptive": False}])
@pytest.mark.parametrize("name", OVERWRITES)
def test_training_is_that_with_a_copied_output(name: str, options: dict[str, float]) -> None:
    found = []
    for copies in (False, True):
        model, loss_fn = Block(OVERWRITES[name], copies=copies), nn.MSELoss()
        opt = KFAC(model, loss_fn, **options)  # type: ignore[arg-type]
        for _ in range(2):
            opt.zero_grad()
            x, y = batch()
            loss_fn(model(x), y).backward()
            opt.step()
        found.append([p.detach() for p in model.parameters()])
    for left, right in zip(*found):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-11)

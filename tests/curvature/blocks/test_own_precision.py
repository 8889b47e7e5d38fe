"""Products, inverses and decompositions inside of a block of autocast."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn

from einconv_kfac.curvature import KroneckerFactors, kronecker_factors

X = torch.randn(24, 5, generator=Generator().manual_seed(0))
Y = torch.randint(3, (24,), generator=Generator().manual_seed(1))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def factors(kind: Any) -> KroneckerFactors:
    loss_fn = nn.CrossEntropyLoss()
    if kind == "sum":
        first = kronecker_factors(model(), loss_fn, [(X, Y)], fisher="exact")
        return first + first
    return kronecker_factors(model(), loss_fn, [(X, Y)], fisher="exact", kind=kind)


def results(own: KroneckerFactors, *, has_inverse: bool) -> list[Tensor]:
    """Everything that curvature computes."""
    generator = Generator().manual_seed(2)
    vector = {name: torch.randn(p.shape, generator=generator) for name, p in shapes().items()}
    found = [*(own @ vector).values(), own.trace(), own.frobenius_norm()]
    found += [block.to_dense() for block in own.values()]
    if has_inverse:
        found += [*own.solve(vector, 0.1).values(), own.logdet(0.1)]
        found += [*own.eigenvalues().values(), *(own.eigh() @ vector).values()]
        found += own.sample(2, damping=0.1, generator=generator).values()
        found += [block.inverse(0.1).to_dense() for block in own.values()]
    return found


def shapes() -> dict[str, Tensor]:
    return dict(model().named_parameters())


@pytest.mark.parametrize("kind", ["kfac", "ekfac", "diagonal", "sum"])
def test_autocast_changes_nothing(kind: str) -> None:
    own = factors(kind)
    expected = results(own, has_inverse=kind != "sum")
    with torch.autocast("cpu", torch.bfloat16):
        got = results(own, has_inverse=kind != "sum")
        assert torch.is_autocast_enabled("cpu")
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)


def test_solution_satisfies_the_system() -> None:
    own = factors("kfac")
    vector = {name: torch.ones_like(p) for name, p in shapes().items()}
    with torch.autocast("cpu", torch.bfloat16):
        solution = own.solve(vector, 0.1)
    product = own.to(torch.float64) @ {n: v.double() for n, v in solution.items()}
    for name, value in product.items():
        back = value + 0.1 * solution[name].double()
        torch.testing.assert_close(back, vector[name].double(), rtol=1e-4, atol=1e-4)

"""What a loss is taken as: `coverage()` says it, and an empirical Fisher is reported once."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac import KFAC, kronecker_factors

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(6, 4, generator=GENERATOR)
T = torch.randn(6, 3, generator=GENERATOR)
Y = torch.arange(6) % 3
WARNING = "The loss has no curvature that is known"
CASES: dict[str, tuple[Callable[[Tensor], Tensor], list[str]]] = {
    "cross entropy": (
        lambda o: functional.cross_entropy(o, Y),
        ["LogSoftmax: the Hessian of a cross entropy"],
    ),
    "probabilities": (
        lambda o: functional.mse_loss(o.softmax(-1), T),
        [
            "MseLoss: the Hessian, a diagonal",
            "Softmax: without curvature of their own, to first order",
        ],
    ),
    "as a whole": (
        lambda o: ((o @ T.T @ T) * o).sum(),
        ["the loss as a whole: the Hessian, in blocks"],
    ),
    "logarithm of probabilities": (
        lambda o: functional.nll_loss(o.softmax(-1).log(), Y),
        ["Log: the Hessian of a cross entropy"],
    ),
    "absolute": (
        lambda o: functional.l1_loss(o, T),
        ["Abs: the information of densities exp(-loss / mean loss)"],
    ),
    "linear": (lambda o: (o * T).mean(), ["linear: the empirical Fisher"]),
}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


@pytest.mark.filterwarnings(f"always:{WARNING}")
@pytest.mark.parametrize("name", CASES)
def test_operations_of_a_loss(name: str) -> None:
    loss, lines = CASES[name]
    model = network()
    opt = KFAC(model)
    assert opt.coverage().losses == ()
    with warnings.catch_warnings(record=True) as found:
        for _ in range(3):
            opt.zero_grad()
            opt.observe(loss(model(X))).backward()
            opt.step()
    assert list(opt.coverage().losses) == lines
    assert str(opt.coverage()).splitlines()[-1] == f"loss, {lines[-1]}"
    empirical = [line for line in lines if line.endswith(("empirical Fisher", "mean loss)"))]
    assert [str(each.message)[: len(WARNING)] for each in found] == [WARNING] * len(empirical)
    assert all("Abs" in str(each.message) for each in found if name == "absolute")


def test_rules_of_loss_modules() -> None:
    model, loss_fn = network(), nn.CrossEntropyLoss()
    opt = KFAC(model, loss_fn)
    loss_fn(model(X), Y).backward()
    assert opt.coverage().losses == ("CrossEntropyLoss: by its rule",)


@pytest.mark.filterwarnings(f"always:{WARNING}")
def test_factors_report_an_empirical_fisher_once() -> None:
    with pytest.warns(UserWarning, match=WARNING) as found:
        kronecker_factors(network(), functional.l1_loss, [(X, T), (X, -T)])
    assert len(found) == 1

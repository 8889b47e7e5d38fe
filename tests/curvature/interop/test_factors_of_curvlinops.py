"""The factors of curvlinops, on every layer it supports.

Normalisations differ. With ``N`` examples, ``S`` positions of the layer and ``T`` loss terms
per example, curvlinops divides ``A`` by the positions (expand) and lets ``B`` carry them, and
its ``B`` is that of the loss terms where ours is that of the examples:

    A = S A_curvlinops, B = B_curvlinops / S          (mean)
    A = S A_curvlinops, B = B_curvlinops / (N S)      (sum, which carries N outside of B)

with ``S = 1`` for reduce. For the empirical Fisher of a mean loss, curvlinops' ``B`` moreover
has ``T`` (terms) and ``C`` (for a squared error of ``C`` outputs) where ours has the gradient
of the example's own loss: ``B = B_curvlinops / (S T C)``. The two linear operators agree in
all other cases: ``A (x) B`` is the same.

One case is left out: exact and reduce with several terms per example. There curvlinops
backpropagates the roots of all terms at once, so that ``B`` has products of terms that the
Hessian does not have. `test_exact_blocks` compares this case with the GGN itself.
"""

from __future__ import annotations

import warnings
from math import prod

import pytest
import torch
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import KFACLinearOperator

from einconv_kfac.curvature import kronecker_factors

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
TYPES = {"exact": "type-2", "empirical": "empirical", "forward-only": "forward-only"}


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=(1, 0)),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, (1, 3), padding="same", bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(27, 5),
    )


def sequence() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False))


class TokensLast(nn.Module):
    """Class scores in the order of torch's cross entropy, ``[n, c, t]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)


MODELS = {
    "convolutional": (convolutional, (6, 2, 6, 7), 1),
    "multilayer": (lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5)), (7, 4), 1),
    "sequence": (sequence, (4, 3, 4), 3),
}


def problem(name: str, loss: str, reduction: str) -> tuple[nn.Module, nn.Module, list, int]:
    build, shape, terms = MODELS[name]
    torch.manual_seed(0)
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    if loss == "cross-entropy":
        model = nn.Sequential(*model, TokensLast()) if terms > 1 else model
        y = torch.randint(5, (shape[0], *[terms] * (terms > 1)))
        loss_fn: nn.Module = nn.CrossEntropyLoss(reduction=reduction)
    else:
        y = torch.randn_like(model(x))
        loss_fn = nn.MSELoss(reduction=reduction)
    cut = shape[0] // 2
    return model, loss_fn, [(x[:cut], y[:cut]), (x[cut:], y[cut:])], terms


def positions(model: nn.Module, x: Tensor) -> dict[str, int]:
    """The weight-sharing positions ``S`` of each layer."""
    found: dict[str, int] = {}
    for name, module in model.named_modules():

        def record(layer: nn.Module, _: object, y: Tensor, name: str = name) -> None:
            found[name] = prod(y.shape[2:] if isinstance(layer, nn.Conv2d) else y.shape[1:-1])

        if isinstance(module, (nn.Linear, nn.Conv2d)):
            module.register_forward_hook(record)
    model(x)
    return found


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("fisher", TYPES)
@pytest.mark.parametrize("loss", ["cross-entropy", "squared-error"])
@pytest.mark.parametrize("name", MODELS)
def test_factors_equal(
    name: str, loss: str, fisher: str, approximation: str, reduction: str
) -> None:
    model, loss_fn, data, terms = problem(name, loss, reduction)
    if terms > 1 and fisher == "exact" and approximation == "reduce":
        return
    reference = KFACLinearOperator(
        model,
        loss_fn,
        list(model.parameters()),
        data,
        fisher_type=TYPES[fisher],
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    reference.compute_kronecker_factors()
    expanded = positions(model, data[0][0])
    examples = sum(x.shape[0] for x, _ in data)
    factors = kronecker_factors(model, loss_fn, data, fisher=fisher, approximation=approximation)
    assert set(factors) == set(reference._input_covariances)
    for layer, block in factors.items():
        shared = expanded[layer] if approximation == "expand" else 1
        a, b = reference._input_covariances[layer], reference._gradient_covariances[layer]
        torch.testing.assert_close(block.A, shared * a[None], **TOLERANCE)
        if fisher == "forward-only":
            scale = 1.0
        elif reduction == "sum":
            scale = 1 / (examples * shared)
        else:
            outputs = 5 if loss == "squared-error" else 1
            scale = 1 / (shared * (terms * outputs if fisher == "empirical" else 1))
        torch.testing.assert_close(block.B, scale * b[None], **TOLERANCE)
        assert block.scale == (examples if reduction == "sum" else 1)

"""The backend for laplace-torch, against that of curvlinops and automatic differentiation."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    laplace = pytest.importorskip("laplace", exc_type=ImportError)
    from laplace.curvature import CurvlinopsGGN

    from einconv_kfac.curvature.interop.laplace import KroneckerGGN

pytestmark = pytest.mark.filterwarnings("ignore")
LIKELIHOODS = ("classification", "regression")


def problem(likelihood: str, *layers: nn.Module) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    layers = layers or (
        nn.Conv2d(2, 4, 3, stride=2, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 3, 2, bias=False),
        nn.Flatten(),
        nn.Linear(12, 3),
    )
    model = nn.Sequential(*layers).double()
    x = torch.randn(12, 2, 6, 6, dtype=torch.float64)
    y = torch.randint(3, (12,)) if likelihood == "classification" else torch.randn(12, 3).double()
    return model, x, y


def fitted(model: nn.Module, x: Tensor, y: Tensor, likelihood: str, **options: Any) -> Any:
    found = laplace.Laplace(model, likelihood, prior_precision=0.7, **options)
    found.fit(DataLoader(TensorDataset(x, y), batch_size=5))
    return found


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("subset", ["all", "last_layer"])
def test_kronecker_posterior_is_that_of_curvlinops(likelihood: str, subset: str) -> None:
    model, x, y = problem(likelihood)
    options = {"subset_of_weights": subset, "hessian_structure": "kron"}
    ours, theirs = (
        fitted(model, x, y, likelihood, backend=backend, **options)
        for backend in (KroneckerGGN, CurvlinopsGGN)
    )
    torch.testing.assert_close(ours.loss, theirs.loss)
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    mean, variance = ours._glm_predictive_distribution(x)
    expected_mean, expected = theirs._glm_predictive_distribution(x)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(variance, expected)


def test_kronecker_factors_add_up_over_batches() -> None:
    model, x, y = problem("classification")
    backend = KroneckerGGN(model, "classification")
    whole = backend.kron(x, y, len(x))[1]
    parts = [backend.kron(x[i], y[i], len(x))[1] for i in (slice(5), slice(5, 12))]
    summed = parts[0] + parts[1]
    for name, one, other in zip(backend._trained_names(), whole.kfacs, summed.kfacs):
        for left, right in zip(one, other):
            torch.testing.assert_close(left, right, msg=name)


LAYERS = {
    "grouped": nn.Conv2d(2, 4, 3, groups=2),
    "transposed": nn.ConvTranspose2d(2, 4, 3),
    "norm": nn.BatchNorm2d(2),
}


def with_layer(name: str, likelihood: str) -> tuple[nn.Module, Tensor, Tensor]:
    layer = LAYERS[name].double().eval()
    features = layer(torch.zeros(1, 2, 6, 6).double()).numel()
    model, x, y = problem(likelihood, layer, nn.Flatten(), nn.Linear(features, 3))
    return model.eval(), x, y


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("name", LAYERS)
def test_diagonal_is_exact(name: str, likelihood: str) -> None:
    model, x, y = with_layer(name, likelihood)
    loss, diagonal = KroneckerGGN(model, likelihood).diag(x, y)
    oracle = CurvlinopsGGN(model, likelihood)
    expected_loss, full = oracle.full(x, y)
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(diagonal, full.diagonal())


def test_norms_have_kronecker_blocks() -> None:
    """The block of a bias is exact with "reduce", since its input is constant."""
    model, x, y = with_layer("norm", "classification")
    backend = KroneckerGGN(model, "classification", approximation="reduce")
    _, kron = backend.kron(x, y, len(x))
    _, full = CurvlinopsGGN(model, "classification").full(x, y)
    weight, bias = (kron.kfacs[i][0] for i in (0, 1))
    torch.testing.assert_close(bias, full[2:4, 2:4].diagonal().diag())
    assert weight.shape == (2, 2)
    assert torch.equal(weight, weight.diagonal().diag())


def test_samples_approach_the_exact_factors() -> None:
    model, x, y = problem("classification")
    exact = KroneckerGGN(model, "classification").kron(x, y, len(x))[1]
    backend = KroneckerGGN(model, "classification", stochastic=True, num_samples=400)
    sampled = backend.kron(x, y, len(x))[1]
    for one, other in zip(exact.kfacs, sampled.kfacs):
        assert (one[0] - other[0]).norm() < 0.3 * one[0].norm()
    assert not torch.equal(sampled.kfacs[0][0], exact.kfacs[0][0])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("grouped", "'0.weight' must have one channel group .* got 2"),
        ("transposed", r"'0.weight' must have inputs or outputs .* got shape \(2, 4, 3, 3\)"),
    ],
)
def test_what_it_cannot_represent_is_refused(name: str, message: str) -> None:
    model, x, y = with_layer(name, "classification")
    with pytest.raises(ValueError, match=message):
        KroneckerGGN(model, "classification").kron(x, y, len(x))


def test_arguments_of_a_call_are_those_of_the_backend() -> None:
    """`Laplace` passes what it is given on to every call."""
    model, x, y = problem("classification")
    own = {"mc_samples": 3, "kfac_approx": "reduce"}
    called = KroneckerGGN(model, "classification", stochastic=True)
    built = KroneckerGGN(
        model, "classification", stochastic=True, num_samples=3, approximation="reduce"
    )
    found = []
    for backend, options in ((called, own), (built, {})):
        torch.manual_seed(0)
        kron = backend.kron(x, y, len(x), **options)[1].kfacs
        diagonal = backend.diag(x, y, N=len(x), **{k: 3 for k in options if k == "mc_samples"})[1]
        found.append([*(factor for pair in kron for factor in pair), diagonal])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other)


def test_unknown_arguments_are_refused() -> None:
    model, x, y = problem("classification")
    backend = KroneckerGGN(model, "classification")
    for method in (backend.full, backend.diag):
        with pytest.raises(TypeError, match=r"must be of \['mc_samples'\], got 'kfac_approx'"):
            method(x, y, N=12, kfac_approx="reduce")
    with pytest.raises(TypeError, match="got 'progress'"):
        backend.kron(x, y, 12, progress=True)


class OfMapping(nn.Module):
    """A model of a mapping, as those of transformers in laplace-torch."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.inner(batch["input_ids"])


def test_a_mapping_is_one_argument() -> None:
    model, x, y = problem("classification")
    backend = KroneckerGGN(OfMapping(model), "classification")
    expected = KroneckerGGN(model, "classification")
    batch = {"input_ids": x}
    torch.testing.assert_close(backend.diag(batch, y)[1], expected.diag(x, y)[1])
    pairs = zip(backend.kron(batch, y, 12)[1].kfacs, expected.kron(x, y, 12)[1].kfacs)
    for found, known in pairs:
        for one, other in zip(found, known):
            torch.testing.assert_close(one, other)

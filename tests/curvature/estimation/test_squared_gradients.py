"""Corrected eigenvalues and diagonals against the GGN by definition, and curvlinops."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from ggn import dense_empirical, dense_ggn
from torch import Tensor, nn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from curvlinops import EKFACLinearOperator

from einconv_kfac.curvature import kronecker_factors

ENTRIES = "einconv_kfac.curvature.estimation.squared_gradients._GRADIENT_ENTRIES"
TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 2, groups=2, padding=1),
        nn.BatchNorm2d(4).eval(),
        nn.Tanh(),
        nn.ConvTranspose2d(4, 3, 2, stride=2),
        nn.Flatten(),
        nn.Linear(192, 3),
    ).double()


class Shared(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(torch.tanh(self.layer(x))))


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "shared":
        torch.manual_seed(0)
        x = torch.randn(5, 4, generator=generator, dtype=torch.float64)
        return Shared().double(), x, torch.randint(4, (5,), generator=generator)
    x = torch.randn(5, 2, 3, 3, generator=generator, dtype=torch.float64)
    return network(), x, torch.randint(3, (5,), generator=generator)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
@pytest.mark.parametrize("name", ["network", "shared"])
def test_diagonal_is_exact(name: str, fisher: str, reduction: str) -> None:
    (model, x, y), loss_fn = problem(name), nn.CrossEntropyLoss(reduction=reduction)
    oracle = dense_ggn if fisher == "exact" else dense_empirical
    data = [(x[:2], y[:2]), (x[2:], y[2:])]
    diagonal = kronecker_factors(model, loss_fn, data, kind="diagonal", fisher=fisher)
    corrected = kronecker_factors(model, loss_fn, data, kind="ekfac", fisher=fisher)
    for layer, block in diagonal.items():
        exact = oracle(model, loss_fn, x, y, layer)
        expected = exact.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(block.values.flatten(1), expected, **TOLERANCE)
        # EKFAC keeps the diagonal in its basis, and with it the trace
        ours = corrected[layer]
        torch.testing.assert_close(ours.values.sum((1, 2)), expected.sum(1), **TOLERANCE)
        for g in range(len(exact)):
            basis = torch.kron(ours.basis_b[g], ours.basis_a[g])
            values = (basis.T @ exact[g] @ basis).diagonal()
            torch.testing.assert_close(ours.values[g].flatten(), values, **TOLERANCE)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("fisher", ["exact", "empirical"])
def test_equals_curvlinops(fisher: str, reduction: str, approximation: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4, bias=False)
    ).double()
    x, y = torch.randn(30, 2, 3, 3, dtype=torch.float64), torch.randint(4, (30,))
    data, loss_fn = [(x[:10], y[:10]), (x[10:], y[10:])], nn.CrossEntropyLoss(reduction=reduction)
    reference = EKFACLinearOperator(
        model,
        loss_fn,
        list(model.parameters()),
        data,
        fisher_type={"exact": "type-2"}.get(fisher, fisher),
        kfac_approx=approximation,
        separate_weight_and_bias=False,
        check_deterministic=False,
    )
    ours = kronecker_factors(
        model, loss_fn, data, kind="ekfac", fisher=fisher, approximation=approximation
    )
    shapes = {name: p.shape for name, p in model.named_parameters()}
    v = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    expected = reference @ list(v.values())
    for got, wanted in zip((ours @ v).values(), expected):
        torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_streaming_in_parts_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    (model, x, y), loss_fn = problem("network"), nn.CrossEntropyLoss()
    whole = kronecker_factors(model, loss_fn, [(x, y)], kind="diagonal", fisher="exact")
    monkeypatch.setattr(ENTRIES, 1)
    parts = kronecker_factors(model, loss_fn, [(x, y)], kind="diagonal", fisher="exact")
    for name in whole:
        torch.testing.assert_close(parts[name].values, whole[name].values, **TOLERANCE)


@pytest.mark.parametrize("largest", [1, 100, 1 << 22])
def test_examples_are_taken_in_parts(largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """More positions than channels, fewer, and none; the sums do not depend on the parts."""
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 40, 3),
        nn.Flatten(),
        nn.Linear(360, 3),
    )
    model, loss_fn = nn.Sequential(*layers).double(), nn.CrossEntropyLoss()
    data = [(torch.randn(4, 2, 5, 5).double(), torch.tensor([0, 1, 2, 0]))]
    options: dict[str, Any] = {"fisher": "exact", "kind": "ekfac"}
    whole = kronecker_factors(model, loss_fn, data, **options)
    monkeypatch.setattr(ENTRIES, largest)
    parts = kronecker_factors(model, loss_fn, data, **options)
    diagonal = kronecker_factors(model, loss_fn, data, fisher="exact", kind="diagonal")
    for name, block in whole.items():
        torch.testing.assert_close(block.values, parts[name].values)
        torch.testing.assert_close(block.trace(), diagonal[name].trace())


class Pairs(nn.Module):
    """Features of examples, of tokens or of tied weights, of which a loss scores all pairs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embedding = nn.Embedding(5, 3)
        self.layer = nn.Linear(3, 5 if kind == "tied" else 2, bias=kind != "tied")
        if kind == "tied":
            self.layer.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.layer(self.embedding(x).tanh())
        return rows.mean(1) if self.kind == "positions" else rows[:, 0]


def similarity_loss(h: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(h @ h.T, y)


@pytest.mark.parametrize("kind", ["one position", "positions", "tied"])
def test_terms_of_several_examples_are_exact(kind: str) -> None:
    """The diagonal has products between the examples of a term."""
    model, x = Pairs(kind).double(), torch.tensor([[0, 1], [2, 2], [1, 4], [3, 0]])
    x, y = x if kind == "positions" else x[:, :1], torch.tensor([1, 0, 3, 2])
    names = dict(model.named_parameters())

    def scores(values: dict[str, Tensor]) -> Tensor:
        h = torch.func.functional_call(model, values, (x,))
        return h @ h.T

    rows = torch.func.jacrev(scores)({n: p.detach() for n, p in names.items()})
    p = scores(names).detach().softmax(1)
    inner = (torch.diag_embed(p) - p[:, :, None] * p[:, None]) / len(x)
    blocks = {
        n: torch.einsum("nap,nab,nbp->p", r.flatten(2), inner, r.flatten(2))
        for n, r in rows.items()
    }
    options: dict[str, Any] = {"fisher": "exact", "kind": "diagonal"}
    found = kronecker_factors(model, similarity_loss, [(x, y)], **options)
    for name, block in found.items():
        weight = f"{name}.weight"
        values = block.values[0, :, : block.values.shape[2] - (f"{name}.bias" in names)]
        values = values.mT if name == "embedding" else values
        expected = blocks[weight].reshape(names[weight].shape)
        torch.testing.assert_close(values, expected, **TOLERANCE)

"""Embeddings: linear layers of one-hot inputs that never exist."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ggn import dense_ggn
from torch import Tensor, nn
from torch.nn import functional

from einconv_kfac.curvature import kronecker_factors

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
VOCABULARY = 7
TOKENS = torch.tensor([[0, 3, 1], [2, 2, 0], [6, 1, 1], [1, 1, 1]])  # 4 and 5 never occur
TARGETS = torch.tensor([0, 2, 1, 1])


class Reader(nn.Module):
    """Scores of three classes; with `split` the embedding is called several times."""

    def __init__(self, padding_idx: int | None = None, split: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 4, padding_idx=padding_idx)
        self.out = nn.Linear(4, 3)
        self.split = split

    def forward(self, tokens: Tensor) -> Tensor:
        if self.split:
            found = torch.stack([self.embedding(column) for column in tokens.unbind(1)], 1)
        else:
            found = self.embedding(tokens)
        weights = torch.arange(1.0, 1 + tokens.shape[1], dtype=found.dtype)[:, None]
        return self.out(torch.tanh(found * weights).sum(1))


def one_hot(padding_idx: int | None) -> Tensor:
    """``a [n, s, d]``."""
    a = functional.one_hot(TOKENS, VOCABULARY).double()
    if padding_idx is not None:
        a[..., padding_idx] = 0
    return a


def output_gradients(model: Reader) -> Tensor:
    """Gradients at the embedding's output along every root of the loss Hessian, ``[v, n, s, co]``.

    They are scaled to those of the examples' own losses.
    """
    found = model.embedding(TOKENS).detach()
    weights = torch.arange(1.0, 4, dtype=found.dtype)[:, None]

    def scores(values: Tensor) -> Tensor:
        return model.out(torch.tanh(values * weights).sum(0))

    slopes = torch.stack([torch.autograd.functional.jacobian(scores, own) for own in found])
    p = torch.stack([scores(own) for own in found]).softmax(-1).detach()  # n c
    hessian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    values, vectors = torch.linalg.eigh(hessian)
    roots = vectors * values.clamp_min(0).sqrt()[:, None, :]  # n c v
    return torch.einsum("ncv,ncsd->vnsd", roots, slopes)


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_factors_are_those_of_one_hot_inputs(
    approximation: Any, padding_idx: int | None, split: bool
) -> None:
    model = Reader(padding_idx, split).double()
    block = kronecker_factors(
        model,
        nn.CrossEntropyLoss(),
        [(TOKENS, TARGETS)],
        fisher="exact",
        approximation=approximation,
    )["embedding"]
    a, g = one_hot(padding_idx), output_gradients(model)
    if approximation == "reduce":
        a, g = a.mean(1, keepdim=True), g.sum(2, keepdim=True)
    expected = torch.einsum("nsd,nse->de", a, a) / len(a)
    if approximation == "expand":
        assert block.A.shape == (1, VOCABULARY)
        torch.testing.assert_close(block.A[0], expected.diagonal(), **TOLERANCE)
    else:
        torch.testing.assert_close(block.A[0], expected, **TOLERANCE)
    expected = torch.einsum("vnsd,vnse->de", g, g) / (g.shape[1] * g.shape[2])
    torch.testing.assert_close(block.B[0], expected, **TOLERANCE)


@pytest.mark.parametrize("kind", ["diagonal", "ekfac"])
@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("padding_idx", [None, 1])
@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_squared_gradients(
    approximation: Any, padding_idx: int | None, split: bool, kind: Any
) -> None:
    """The diagonal of the exact GGN in the basis of the block."""
    model, loss_fn = Reader(padding_idx, split).double(), nn.CrossEntropyLoss()
    block = kronecker_factors(
        model,
        loss_fn,
        [(TOKENS[:1], TARGETS[:1]), (TOKENS[1:], TARGETS[1:])],
        fisher="exact",
        approximation=approximation,
        kind=kind,
    )["embedding"]
    (exact,) = dense_ggn(model, loss_fn, TOKENS, TARGETS, "embedding")
    eyes = torch.eye(4).double(), torch.eye(VOCABULARY).double()
    own = (block.basis_b, block.basis_a)
    sides = [eye if u is None else u[0].contiguous() for u, eye in zip(own, eyes)]
    basis = torch.kron(*sides)
    assert (block.basis_a is None) == (kind == "diagonal" or approximation == "expand")
    expected = (basis.T @ exact @ basis).diagonal()
    torch.testing.assert_close(block.values.flatten(), expected, **TOLERANCE)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
def test_the_vocabulary_of_a_language_model(approximation: Any) -> None:
    """A dense factor of it would take 10 GB."""
    size = 50257
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(size, 4), nn.Linear(4, size))
    tokens = torch.tensor([[0, 5, size - 1, 5], [7, 7, 7, 0]])
    data = [(tokens, torch.zeros(2, 4, size))]
    options: dict[str, Any] = {"approximation": approximation, "fisher": "mc"}
    curvature = kronecker_factors(model, nn.MSELoss(), data, **options)
    assert curvature["0"].A.shape == curvature["1"].B.shape == (1, size)
    assert "0: (1, 4, 50257), A diagonal" in repr(curvature)
    assert "1: (1, 50257, 5), B diagonal" in repr(curvature)
    expected = torch.zeros(size)
    if approximation == "expand":
        expected[[0, 5, 7, size - 1]] = torch.tensor([2.0, 2, 3, 1]) / 2
    else:
        expected[[0, 5, 7, size - 1]] = torch.tensor([2.0, 4, 9, 1]) / 16 / 2
    torch.testing.assert_close(curvature["0"].A[0], expected)
    solved = curvature.solve({n: torch.ones_like(p) for n, p in model.named_parameters()}, 0.1)
    assert all(part.isfinite().all() for part in solved.values())


def test_counts_in_small_dtypes_are_exact() -> None:
    model = nn.Sequential(nn.Embedding(3, 2), nn.Flatten()).bfloat16()
    tokens = torch.ones(1, 1001, dtype=torch.int32)
    data = [(tokens, torch.zeros(1, 2002, dtype=torch.bfloat16))]
    block = kronecker_factors(model, nn.MSELoss(), data)["0"]
    assert block.A.tolist() == [[0, 1001, 0]]

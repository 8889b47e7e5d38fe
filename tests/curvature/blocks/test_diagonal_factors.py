"""Blocks with diagonal factors against the same blocks with dense ones, in float64."""

from __future__ import annotations

import io
from itertools import product

import pytest
import torch
from torch import Tensor

from einconv_kfac.curvature import EigenBlock, KroneckerBlock, KroneckerFactors, Layout, pooled
from einconv_kfac.curvature.blocks.cholesky import invert_damped, split_damping

TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
ALL = list(product((True, False), repeat=2))
FORMS = ALL[:-1]
"""Whether `A` and `B` are diagonal."""
SHAPE = (2, 3, 4)


def layout() -> Layout:
    return Layout("weight", None, (6, 4), (2, 3, 4), (0, 1, 2))


def factor(size: int, diagonal: bool) -> Tensor:
    entries = torch.rand(2, size, dtype=torch.float64) + 0.1
    if diagonal:
        return entries
    rows = torch.randn(2, size, 2 * size, dtype=torch.float64)
    return rows @ rows.mT


def dense(own: Tensor) -> Tensor:
    return torch.diag_embed(own) if own.ndim == 2 else own


def blocks(forms: tuple[bool, bool], scale: float = 3.0) -> tuple[KroneckerBlock, Tensor]:
    """A block, and its dense matrix, block-diagonal over groups."""
    a, b = factor(4, forms[0]), factor(3, forms[1])
    products = [scale * torch.kron(*pair) for pair in zip(dense(b), dense(a))]
    return KroneckerBlock(a, b, layout(), scale), torch.block_diag(*products)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_the_algebra_is_that_of_dense_matrices(forms: tuple[bool, bool]) -> None:
    block, matrix = blocks(forms)
    eye = torch.eye(len(matrix), dtype=matrix.dtype)
    torch.testing.assert_close(torch.block_diag(*block.to_dense()), matrix, **TOLERANCE)
    vectors = torch.randn(5, *SHAPE, dtype=torch.float64)
    flat = vectors.flatten(1)
    torch.testing.assert_close(block.matmul(vectors).flatten(1), flat @ matrix, **TOLERANCE)
    torch.testing.assert_close(block.diagonal().flatten(), matrix.diagonal(), **TOLERANCE)
    torch.testing.assert_close(block.trace(), matrix.trace(), **TOLERANCE)
    torch.testing.assert_close(block.frobenius_norm(), matrix.norm(), **TOLERANCE)
    torch.testing.assert_close(
        block.logdet(0.1), torch.linalg.slogdet(matrix + 0.1 * eye)[1], **TOLERANCE
    )
    values = block.eigenvalues().flatten().sort().values
    torch.testing.assert_close(values, torch.linalg.eigvalsh(matrix), **TOLERANCE)
    torch.testing.assert_close(
        block.inverse(0.2).matmul(vectors).flatten(1),
        flat @ torch.linalg.inv(matrix + 0.2 * eye),
        **TOLERANCE,
    )
    restored = block.eigh().matmul(vectors)
    torch.testing.assert_close(restored.flatten(1), flat @ matrix, **TOLERANCE)


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_the_factored_inverse_splits_the_damping_by_traces(forms: tuple[bool, bool]) -> None:
    block, _ = blocks(forms)
    full = KroneckerBlock(dense(block.A), dense(block.B), block.layout, block.scale)
    got, expected = (own.inverse(0.3, exact=False) for own in (block, full))
    torch.testing.assert_close(got.to_dense(), expected.to_dense(), **TOLERANCE)
    pair = (block.A, block.B)
    (found,) = invert_damped([pair], [0.3], ["it"])
    parts = split_damping(pair, 0.3)
    for index, (own, damping) in enumerate(zip(pair, parts)):
        matrix = dense(own)
        damped = matrix + damping[:, None, None] * torch.eye(matrix.shape[-1], dtype=matrix.dtype)
        torch.testing.assert_close(dense(found.inverses[index]), torch.linalg.inv(damped))
        torch.testing.assert_close(found.conditions()[index], torch.linalg.cond(damped, 1).amax())


def test_a_negative_entry_is_not_positive_definite() -> None:
    bad = torch.tensor([[1.0, -0.5]])
    with pytest.raises(RuntimeError, match="damped factor A of it must be positive definite"):
        invert_damped([(bad, torch.ones(1, 2))], [0.05], ["it"])
    (found,) = invert_damped([(bad, torch.ones(1, 2))], [0.05], ["it"], damping_increases=9)
    assert found.retries > 1


@pytest.mark.parametrize("forms", FORMS, ids=str)
def test_sums_pools_and_states(forms: tuple[bool, bool]) -> None:
    (left, one), (right, two) = blocks(forms), blocks((False, False))
    both = KroneckerFactors({"": left}) + KroneckerFactors({"": right})
    torch.testing.assert_close(both.trace(), (one + two).trace(), **TOLERANCE)
    torch.testing.assert_close(both.frobenius_norm(), (one + two).norm(), **TOLERANCE)
    with pytest.raises(ValueError, match=r"must have one form to be pooled.*max_factor_size"):
        pooled([KroneckerFactors({"": left}), KroneckerFactors({"": right})], [1, 1])
    own = KroneckerFactors({"": left})
    joined = pooled([own, own], [1, 3])
    torch.testing.assert_close(joined[""].A, left.A, **TOLERANCE)
    for curvature in (own, own.eigh(), own.inverse(0.1), own.inverse(0.1, exact=False)):
        stream = io.BytesIO()
        torch.save(curvature.state_dict(), stream)
        stream.seek(0)
        loaded = KroneckerFactors.from_state_dict(torch.load(stream, weights_only=True))
        assert torch.equal(loaded[""].to_dense(), curvature[""].to_dense())


def test_the_printed_curvature_names_diagonal_factors() -> None:
    texts = {forms: repr(KroneckerFactors({"fc": blocks(forms)[0]})) for forms in FORMS}
    assert "fc: (2, 3, 4), A and B diagonal" in texts[True, True]
    assert "fc: (2, 3, 4), A diagonal" in texts[True, False]
    assert "fc: (2, 3, 4), B diagonal" in texts[False, True]
    assert "diagonal" not in repr(KroneckerFactors({"fc": blocks((False, False))[0]}))


@pytest.mark.parametrize("old", ALL, ids=str)
@pytest.mark.parametrize("new", ALL, ids=str)
def test_diagonal_in_another_basis(old: tuple[bool, bool], new: tuple[bool, bool]) -> None:
    """Bases that are the identity are left out."""

    def bases(forms: tuple[bool, bool]) -> EigenBlock:
        block: EigenBlock = blocks(forms)[0].eigh()
        assert [block.basis_a is None, block.basis_b is None] == list(forms)
        return block

    left, right = bases(old), bases(new)
    pairs = (right.basis_b, 3), (right.basis_a, 4)
    sides = [torch.eye(size).double().expand(2, -1, -1) if u is None else u for u, size in pairs]
    basis = [torch.kron(b.contiguous(), a.contiguous()) for b, a in zip(*sides)]
    expected = torch.stack([(u.T @ m @ u).diagonal() for u, m in zip(basis, left.to_dense())])
    torch.testing.assert_close(left.diagonal_in(right).flatten(1), expected, **TOLERANCE)

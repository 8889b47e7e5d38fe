"""Sums of blocks, as exact operators or as the factors of pooled data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.blocks.block import Block
from einconv_kfac.curvature.blocks.diagonal_factor import inner_product
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.blocks.own_precision import in_own_precision


@in_own_precision
@dataclass(frozen=True, eq=False)
class SumBlock:
    """The sum of blocks of the same parameters, kept as its terms.

    A sum of Kronecker products is not a Kronecker product. It has products, trace and norm, but
    no factored inverse or eigendecomposition.

    Args:
        terms: The blocks, none of which is a sum.
    """

    terms: tuple[Block, ...]

    @property
    def layout(self) -> Layout:
        """The parameters, and how they form matrices."""
        return self.terms[0].layout

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weight and, if it has one, the bias."""
        return self.layout.parameters

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the product with matrices ``[*v, g, co, d]``."""
        return _total([term.matmul(matrix) for term in self.terms])

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""
        return _total([term.to_dense() for term in self.terms])

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[g, co, d]``."""
        return _total([term.diagonal() for term in self.terms])

    def trace(self) -> Tensor:
        """Return the trace."""
        return _total([term.trace() for term in self.terms])

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        inner = [_inner_product(left, right) for left in self.terms for right in self.terms]
        return _total(inner).clamp_min(0).sqrt()

    def scaled(self, factor: float) -> SumBlock:
        """Return the block times a number."""
        return SumBlock(tuple(term.scaled(factor) for term in self.terms))

    def to(self, *args: Any, **kwargs: Any) -> SumBlock:
        """Return the block on another device or with another dtype, as ``Tensor.to``."""
        return SumBlock(tuple(term.to(*args, **kwargs) for term in self.terms))

    def state_dict(self) -> dict[str, Any]:
        """See `Block`."""
        return {"terms": [term.state_dict() for term in self.terms]}

    def eigh(self) -> NoReturn:
        """Raise a ``NotImplementedError``, as do the operations that need eigenvalues."""
        raise NotImplementedError(
            f"A sum of {len(self.terms)} blocks has no factored eigendecomposition or inverse. "
            "`pooled` adds the factors instead, which does."
        )

    def eigenvalues(self) -> Tensor:
        """See `eigh`."""
        self.eigh()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """See `eigh`."""
        self.eigh()

    def inverse(self, damping: float, exact: bool = True) -> NoReturn:
        """See `eigh`."""
        self.eigh()

    def sample(
        self, count: int, *, damping: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """See `eigh`."""
        self.eigh()


def added(blocks: Sequence[Block]) -> SumBlock:
    """Return the sum of blocks.

    Raises:
        ValueError: If the blocks are of different parameters.
    """
    terms = [term for block in blocks for term in block.terms]
    for term in terms:
        if term.layout != terms[0].layout:
            raise ValueError(
                f"Blocks must be of the same parameters to be added, got {terms[0].parameters} and "
                f"{term.parameters}."
            )
    return SumBlock(tuple(terms))


def pooled_block(blocks: Sequence[KroneckerBlock], weights: Sequence[float]) -> KroneckerBlock:
    """Return the block whose factors are the weighted means of the blocks' factors.

    Raises:
        ValueError: If the blocks are not Kronecker products of the same parameters.
    """
    layouts = {block.layout for block in blocks}
    if len(layouts) > 1 or not all(isinstance(block, KroneckerBlock) for block in blocks):
        kinds = sorted({type(block).__name__ for block in blocks})
        raise ValueError(
            "Blocks must be Kronecker products of the same parameters to be pooled, got "
            f"{', '.join(kinds)} of {len(layouts)} layouts. Add them with `+` instead."
        )
    shapes = sorted({(tuple(block.A.shape), tuple(block.B.shape)) for block in blocks})
    if len(shapes) > 1:
        raise ValueError(
            f"Factors of {' and '.join(blocks[0].parameters)} must have one form to be pooled, got "
            f"shapes {shapes}. Compute all with the same `max_factor_size`."
        )
    total = sum(weights)
    a = _total([block.A * (weight / total) for block, weight in zip(blocks, weights)])
    b = _total([block.B * (weight / total) for block, weight in zip(blocks, weights)])
    scale = sum(block.scale * weight for block, weight in zip(blocks, weights)) / total
    return KroneckerBlock(a, b, layouts.pop(), scale)


def _inner_product(left: Block, right: Block) -> Tensor:
    """Return the trace of the product of two blocks, summed over groups."""
    if isinstance(left, KroneckerBlock) and isinstance(right, KroneckerBlock):
        a, b = inner_product(left.A, right.A), inner_product(left.B, right.B)
        return left.scale * right.scale * (a * b).sum()
    first, second = left.eigh(), right.eigh()
    return (first.values * second.diagonal_in(first)).sum()


def _total(tensors: Sequence[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape."""
    return torch.stack(list(tensors)).sum(0)

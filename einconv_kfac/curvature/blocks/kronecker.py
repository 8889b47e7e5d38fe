"""A block of curvature as a Kronecker product per channel group."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.blocks.cholesky import damped_inverses
from einconv_kfac.curvature.blocks.eigen import EigenBlock, decomposed
from einconv_kfac.curvature.blocks.matrix_layout import Layout


@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """One layer's block of the Fisher or GGN: ``scale * B[g] (x) A[g]`` per channel group.

    Rows are ordered as the layout's matrices ``[g, co, d]``, for most layers as
    ``weight.flatten(1)`` within a group with the bias last. Blocks are immutable.

    Args:
        A: Input-based factor ``[g, d, d]``, averaged over examples.
        B: Gradient-based factor ``[g, co, co]``, averaged over examples (and positions).
        layout: The parameters, and how they form matrices.
        scale: 1 for a mean loss, the number of examples for a sum.

    >>> layout = Layout("weight", None, (2, 3), (1, 2, 3), (0, 1, 2))
    >>> block = KroneckerBlock(torch.eye(3)[None], 2 * torch.eye(2)[None], layout)
    >>> block.trace(), block.logdet()
    (tensor(12.), tensor(4.1589))
    """

    A: Tensor
    B: Tensor
    layout: Layout
    scale: float = 1.0

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weight and, if it has one, the bias."""
        return self.layout.parameters

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the product with matrices ``[*v, g, co, d]``: ``scale * B V A``."""
        return self.scale * (self.B @ matrix.to(self.A.dtype) @ self.A)

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""
        return self.scale * torch.stack([torch.kron(b, a) for a, b in zip(self.A, self.B)])

    def trace(self) -> Tensor:
        """Return the trace, ``scale * sum_g tr(A) tr(B)``."""
        return self.scale * (_trace(self.A) * _trace(self.B)).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        a, b = self.A.square().sum((-2, -1)), self.B.square().sum((-2, -1))
        return abs(self.scale) * (a * b).sum().sqrt()

    def eigh(self) -> EigenBlock:
        """Return the eigendecomposition; it takes one of ``A`` and one of ``B``."""
        a, basis_a = decomposed(self.A)
        b, basis_b = decomposed(self.B)
        values = self.scale * b[:, :, None] * a[:, None, :]
        return EigenBlock(basis_a, basis_b, values, self.layout)

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues ``[g, co, d]``, unordered."""
        return self.eigh().eigenvalues()

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(block + damping I)``; minus infinity where singular."""
        return self.eigh().logdet(damping)

    def inverse(self, damping: float, exact: bool = True) -> KroneckerBlock | EigenBlock:
        """Return ``(block + damping I)^-1``.

        Args:
            damping: Multiple of the identity, positive (or zero for a regular block).
            exact: If not, the damping is split between the factors with trace balance
                (Martens and Grosse, 2015)::

                    1/scale (B + sqrt(l) / pi I)^-1 (x) (A + pi sqrt(l) I)^-1
                    pi = sqrt((tr(A) / d) / (tr(B) / co)), l = damping / scale

        Raises:
            ValueError: If the damping is negative.
            RuntimeError: If the damped block is not positive definite.
        """
        check_damping(damping)
        if exact:
            return self.eigh().inverse(damping)
        names = " and ".join(self.parameters)
        a, b = damped_inverses((self.A, self.B), damping / self.scale, names)
        return KroneckerBlock(a, b, self.layout, 1 / self.scale)

    def sample(
        self, count: int, *, damping: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """Draw matrices ``[v, g, co, d]`` from the Gaussian with precision block + damping I."""
        return self.eigh().sample(count, damping=damping, generator=generator)

    def scaled(self, factor: float) -> KroneckerBlock:
        """Return the block times a number."""
        return replace(self, scale=self.scale * factor)

    def to(self, *args: Any, **kwargs: Any) -> KroneckerBlock:
        """Return the block on another device or with another dtype, as ``Tensor.to``."""
        return replace(self, A=self.A.to(*args, **kwargs), B=self.B.to(*args, **kwargs))


def check_damping(damping: float) -> None:
    """Raise a ``ValueError`` if a damping is negative or not a number."""
    if not 0 <= damping < float("inf"):
        raise ValueError(f"`damping` must be a finite number >= 0, got {damping}.")


def _trace(factor: Tensor) -> Tensor:
    """Return the trace per group, ``[g]``."""
    return factor.diagonal(dim1=-2, dim2=-1).sum(-1)

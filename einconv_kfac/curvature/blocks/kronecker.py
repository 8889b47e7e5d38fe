"""A block of curvature as a Kronecker product per channel group."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.arguments import (
    LEAST_DAMPING,
    MULTIPLIER_END,
    checked_damping,
    flag,
    number,
)
from einconv_kfac.curvature.blocks.cholesky import invert_damped
from einconv_kfac.curvature.blocks.diagonal_factor import (
    dense,
    diagonal_of,
    inner_product,
    times,
    times_on_right,
    trace_of,
)
from einconv_kfac.curvature.blocks.eigen import (
    EigenBlock,
    decompositions,
)
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.blocks.own_precision import in_own_precision


@in_own_precision
@dataclass(frozen=True, eq=False)
class KroneckerBlock:
    """One layer's block of the Fisher or GGN: ``scale * B[g] (x) A[g]`` per channel group.

    Rows are ordered as the layout's matrices ``[g, co, d]``, for most layers as
    ``weight.flatten(1)`` within a group with the bias last. Blocks are immutable.

    Args:
        A: Input-based factor ``[g, d, d]``, averaged over examples. A factor that is diagonal
            is stored as its diagonal, here ``[g, d]``: that of an embedding's one-hot inputs, or
            one larger than ``max_factor_size`` (see `kronecker_factors`).
        B: Gradient-based factor ``[g, co, co]``, averaged over examples (and positions), or its
            diagonal ``[g, co]``.
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

    @property
    def terms(self) -> tuple[KroneckerBlock]:
        """See `Block`."""
        return (self,)

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the product with matrices ``[*v, g, co, d]``: ``scale * B V A``."""
        return self.scale * times_on_right(times(self.B, matrix.to(self.A.dtype)), self.A)

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""
        pairs = zip(*(dense(factor).contiguous() for factor in (self.B, self.A)))  # for `kron`
        return self.scale * torch.stack([torch.kron(b, a) for b, a in pairs])

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[g, co, d]``, without the dense matrix."""
        a, b = diagonal_of(self.A), diagonal_of(self.B)
        return self.scale * b[:, :, None] * a[:, None, :]

    def trace(self) -> Tensor:
        """Return the trace, ``scale * sum_g tr(A) tr(B)``."""
        return self.scale * (trace_of(self.A) * trace_of(self.B)).sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        a, b = inner_product(self.A, self.A), inner_product(self.B, self.B)
        return abs(self.scale) * (a * b).sum().sqrt()

    def eigh(self) -> EigenBlock:
        """Return the eigendecomposition, by one of ``A`` and one of ``B``.

        Raises:
            RuntimeError: If a factor is not finite.
        """
        owner = " and ".join(self.parameters)
        names = [f"the factor {letter} of {owner}" for letter in "AB"]
        (a, basis_a), (b, basis_b) = decompositions([self.A, self.B], names)
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
            exact: Whether the inverse is exact. If not, the damping is split between the
                factors by trace balance (Martens and Grosse, 2015)::

                    1/scale (B + sqrt(l) / pi I)^-1 (x) (A + pi sqrt(l) I)^-1
                    pi = sqrt((tr(A) / d) / (tr(B) / co)), l = damping / scale

        Raises:
            ValueError: If the damping is negative.
            RuntimeError: If the damped block is not positive definite.

        Warns:
            RuntimeWarning: If the factored inverse needed float64.
        """
        damping = checked_damping(damping)
        if flag("exact", exact):
            return self.eigh().inverse(damping)
        names = " and ".join(self.parameters)
        if not self.scale > 0:
            raise RuntimeError(
                f"The block of {names} must be positive for exact=False, got its factors times "
                f"{self.scale}. Pass exact=True."
            )
        self._check_splits(damping)
        (found,) = invert_damped([(self.A, self.B)], [damping / self.scale], [names])
        if found.retries:
            warnings.warn(
                f"The damped factors of {names} were not positive definite in {self.A.dtype}; "
                "they were inverted in float64. A larger `damping` avoids this.",
                RuntimeWarning,
                stacklevel=2,
            )
        a, b = found.inverses
        return KroneckerBlock(a.to(self.A.dtype), b.to(self.B.dtype), self.layout, 1 / self.scale)

    def _check_splits(self, damping: Any) -> None:
        """Raise a ``ValueError`` if the root of a damping is beyond float32."""
        part = float(damping) / self.scale
        if part and not LEAST_DAMPING <= part < MULTIPLIER_END:
            raise ValueError(
                f"`damping` must be zero or in [{LEAST_DAMPING}, {MULTIPLIER_END}) for "
                f"exact=False, relative to the scale {self.scale} of the block, got {part}. Pass "
                "exact=True."
            )

    def sample(
        self, count: int, *, damping: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """Draw matrices ``[v, g, co, d]`` from the Gaussian with precision block + damping I."""
        return self.eigh().sample(count, damping=damping, generator=generator)

    def scaled(self, factor: float) -> KroneckerBlock:
        """Return the block times a number."""
        return replace(self, scale=self.scale * number("factor", factor))

    def to(self, *args: Any, **kwargs: Any) -> KroneckerBlock:
        """Return the block on another device or with another dtype, as ``Tensor.to``."""
        return replace(self, A=self.A.to(*args, **kwargs), B=self.B.to(*args, **kwargs))

    def state_dict(self) -> dict[str, Any]:
        """See `Block`."""
        layout = self.layout.state_dict()
        return {"layout": layout, "A": self.A, "B": self.B, "scale": self.scale}

"""A block of curvature by its eigenvalues in a Kronecker-factored basis."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.arguments import (
    LARGEST_INTEGER,
    checked_damping,
    flag,
    number,
    positive_integer,
    random_generator,
)
from einconv_kfac.curvature.blocks.batching import batched
from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.blocks.own_precision import in_own_precision
from einconv_kfac.curvature.devices.products import product

_SMALLEST_SCALE = torch.finfo(torch.float64).tiny


@in_own_precision
@dataclass(frozen=True, eq=False)
class EigenBlock:
    """A block ``(U_B (x) U_A) diag(values) (U_B (x) U_A)^T`` per channel group.

    It represents an eigendecomposition of a `KroneckerBlock`, a block with corrected eigenvalues
    (EKFAC; George et al., 2018), an exact damped inverse, or, without bases, a diagonal.

    Args:
        basis_a: Orthogonal ``U_A [g, d, d]``, eigenvectors in columns, or ``None`` for the
            identity.
        basis_b: Orthogonal ``U_B [g, co, co]``, or ``None`` for the identity.
        values: Eigenvalues ``[g, co, d]``.
        layout: The parameters, and how they form matrices.

    >>> layout = Layout("weight", None, (2, 3), (1, 2, 3), (0, 1, 2))
    >>> block = EigenBlock(None, None, torch.full((1, 2, 3), 4.0), layout)
    >>> block.inverse(damping=1.0).trace()
    tensor(1.2000)
    """

    basis_a: Tensor | None
    basis_b: Tensor | None
    values: Tensor
    layout: Layout

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the weight and, if it has one, the bias."""
        return self.layout.parameters

    @property
    def terms(self) -> tuple[EigenBlock]:
        """See `Block`."""
        return (self,)

    def rotated(self, matrix: Tensor) -> Tensor:
        """Return matrices ``[*v, g, co, d]`` in the eigenbasis: ``U_B^T V U_A``."""
        matrix = matrix.to(self.values.dtype)
        matrix = matrix if self.basis_b is None else self.basis_b.mT @ matrix
        return matrix if self.basis_a is None else matrix @ self.basis_a

    def restored(self, matrix: Tensor) -> Tensor:
        """Return matrices of the eigenbasis in the original basis: ``U_B V U_A^T``."""
        matrix = matrix if self.basis_b is None else self.basis_b @ matrix
        return matrix if self.basis_a is None else matrix @ self.basis_a.mT

    def matmul(self, matrix: Tensor) -> Tensor:
        """Return the product with matrices ``[*v, g, co, d]``."""
        return self.restored(self.values * self.rotated(matrix))

    def to_dense(self) -> Tensor:
        """Return the blocks as ``[g, co * d, co * d]``."""
        g, co, d = self.values.shape
        eye = torch.eye(co * d, dtype=self.values.dtype, device=self.values.device)
        columns = self.matmul(eye.reshape(-1, 1, co, d).expand(-1, g, co, d))  # v g co d
        return columns.flatten(2).permute(1, 2, 0)

    def diagonal(self) -> Tensor:
        """Return the diagonal ``[g, co, d]``, ``U_B^2 values (U_A^2)^T`` with squared entries."""
        basis_a, basis_b, values = self.basis_a, self.basis_b, self.values
        values = values if basis_b is None else basis_b.square() @ values
        return values if basis_a is None else values @ basis_a.square().mT

    def diagonal_in(self, other: EigenBlock) -> Tensor:
        """Return the block's diagonal in the eigenbasis of another block, ``[g, co, d]``.

        With ``Q_A = U_A^T V_A`` from this block's basis ``V`` to the other's ``U``, and ``Q_B``
        alike, it is ``Q_B^2 values (Q_A^2)^T`` with squares of entries. Its sum is the trace.
        """
        a = _squared_overlap(other.basis_a, self.basis_a)
        b = _squared_overlap(other.basis_b, self.basis_b)
        values = self.values.to(other.values.dtype)
        values = values if b is None else b.to(values.dtype) @ values
        return values if a is None else values @ a.mT.to(values.dtype)

    def trace(self) -> Tensor:
        """Return the trace."""
        return self.values.sum()

    def frobenius_norm(self) -> Tensor:
        """Return the Frobenius norm."""
        return self.values.square().sum().sqrt()

    def eigh(self) -> EigenBlock:
        """Return the block itself, which is an eigendecomposition."""
        return self

    def eigenvalues(self) -> Tensor:
        """Return the eigenvalues ``[g, co, d]``, unordered."""
        return self.values

    def logdet(self, damping: float = 0.0) -> Tensor:
        """Return ``log det(block + damping I)``; minus infinity where singular."""
        damped: Tensor = self.values + checked_damping(damping)
        return damped.clamp_min(0).log().sum()

    def inverse(self, damping: float, exact: bool = True) -> EigenBlock:
        """Return ``(block + damping I)^-1``. It is exact whatever ``exact`` says.

        Raises:
            ValueError: If the damping is negative.
            RuntimeError: If the damped block is not positive definite.
        """
        flag("exact", exact)
        return replace(self, values=1 / self._damped(damping))

    def sample(
        self, count: int, *, damping: float = 0.0, generator: Generator | None = None
    ) -> Tensor:
        """Draw matrices ``[v, g, co, d]`` from the Gaussian with precision block + damping I.

        Raises:
            ValueError: If the damping is negative.
            RuntimeError: If the damped block is not positive definite.
        """
        root = self._damped(damping).rsqrt()
        shape = (positive_integer("count", count, below=LARGEST_INTEGER), *self.values.shape)
        source = random_generator("generator", generator)
        noise = torch.randn(shape, generator=source, dtype=root.dtype, device=root.device)
        return self.restored(noise * root)

    def scaled(self, factor: float) -> EigenBlock:
        """Return the block times a number."""
        return replace(self, values=self.values * number("factor", factor))

    def to(self, *args: Any, **kwargs: Any) -> EigenBlock:
        """Return the block on another device or with another dtype, as ``Tensor.to``."""
        return EigenBlock(
            None if self.basis_a is None else self.basis_a.to(*args, **kwargs),
            None if self.basis_b is None else self.basis_b.to(*args, **kwargs),
            self.values.to(*args, **kwargs),
            self.layout,
        )

    def state_dict(self) -> dict[str, Any]:
        """See `Block`."""
        tensors = {"basis_a": self.basis_a, "basis_b": self.basis_b, "values": self.values}
        return {"layout": self.layout.state_dict(), **tensors}

    def _damped(self, damping: float) -> Tensor:
        """Return the damped eigenvalues, which must be positive."""
        damped: Tensor = self.values + checked_damping(damping)
        if not bool((damped > 0).all()):
            raise RuntimeError(
                f"The damped block of {' and '.join(self.parameters)} must be positive definite, "
                f"but has the eigenvalue {float(damped.min()):.3g}. A larger `damping` helps."
            )
        return damped


def eigendecomposition(factor: Tensor, name: str = "a factor") -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[g, d]``, not negative, and eigenvectors ``[g, d, d]`` of a factor.

    The factor is positive semi-definite; eigenvalues that rounding made negative become zero.
    The driver may fail in float32, with an error or with results that are not numbers, above all
    for factors with rows of zeros. Those matrices are decomposed in float64.

    Args:
        factor: The factor ``[g, d, d]``.
        name: What it is called in an error.

    Raises:
        RuntimeError: If the decomposition fails in float64 as well, or the factor is not finite.
    """
    precise = factor.to(torch.promote_types(factor.dtype, torch.float32))
    try:
        values, vectors = torch.linalg.eigh(precise)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        values, vectors = _eigh_in_float64(precise, name)
    failed = ~(values.isfinite().all(-1) & vectors.isfinite().flatten(1).all(-1))
    if bool(failed.any()):
        values[failed], vectors[failed] = _eigh_in_float64(precise[failed], name)
    return values.clamp_min(0).to(factor.dtype), vectors.to(factor.dtype)


def _eigh_in_float64(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues and eigenvectors, computed in float64, in the dtype of the factor.

    Raises:
        RuntimeError: If that fails, or the factor is not finite.
    """
    if not bool(factor.isfinite().all()):
        raise RuntimeError(
            f"The entries of {name} must be finite for an eigendecomposition, got NaN or infinity. "
            "Leave out the batches or the layer that they come from."
        )
    scale = factor.abs().amax((-2, -1), keepdim=True).double().clamp_min(_SMALLEST_SCALE)
    scaled = factor.double() / scale
    try:
        values, vectors = torch.linalg.eigh(scaled)
        failed = not bool(values.isfinite().all() & vectors.isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        failed = True
    if failed:
        parts = [_eigh_beside_zeros(part, name) for part in scaled.unbind()]
        values, vectors = map(torch.stack, zip(*parts))
    values, vectors = (values * scale[..., 0]).to(factor.dtype), vectors.to(factor.dtype)
    if not bool(values.isfinite().all() & vectors.isfinite().all()):
        raise RuntimeError(
            f"The eigendecomposition of {name} must be finite, but is not in float64 either."
        )
    return values, vectors


def _eigh_beside_zeros(factor: Tensor, name: str) -> tuple[Tensor, Tensor]:
    """Return eigenvalues ``[d]`` and eigenvectors ``[d, d]`` of one factor without its zero rows.

    The unit vector of a row of zeros is an eigenvector with the eigenvalue zero.

    Raises:
        RuntimeError: If the decomposition of the other rows fails.
    """
    used = (factor != 0).any(-1)
    rows, zeros = used.nonzero()[:, 0], (~used).nonzero()[:, 0]
    try:
        own_values, own_vectors = torch.linalg.eigh(factor[None, rows[:, None], rows])
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"The eigendecomposition of {name} failed in float64.") from error
    values, vectors = factor.new_zeros(len(factor)), torch.zeros_like(factor)
    values[len(zeros) :] = own_values[0]
    vectors[zeros, torch.arange(len(zeros), device=factor.device)] = 1
    vectors[rows, len(zeros) :] = own_vectors[0]
    return values, vectors


def decompositions(
    factors: Sequence[Tensor], names: Sequence[str]
) -> list[tuple[Tensor, Tensor | None]]:
    """Return eigenvalues and eigenvectors of factors; ``None`` is the basis of a diagonal one.

    Args:
        factors: Factors ``[g, d, d]``, or their diagonals ``[g, d]``.
        names: What they are called in an error.

    Raises:
        RuntimeError: If one cannot be decomposed.
    """
    found: Iterator[Any]
    dense = [(f, name) for f, name in zip(factors, names) if not is_diagonal(f)]
    try:
        found = iter(batched(eigendecomposition, [factor for factor, _ in dense]))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # again one by one, so that the error names the factor
        found = iter([eigendecomposition(factor, name) for factor, name in dense])
    results: list[tuple[Tensor, Tensor | None]] = []
    for factor in factors:
        values, basis = (factor.clamp_min(0), None) if is_diagonal(factor) else next(found)
        results.append((values, basis))
    return results


def _squared_overlap(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """Return the squared inner products of the vectors of two bases, ``[g, d, d]``.

    ``None`` is the identity, as a basis and as the result.
    """
    if left is None:
        return None if right is None else right.square()
    if right is None:
        return left.mT.square()
    return product(left.mT, right.to(left.dtype)).square_()

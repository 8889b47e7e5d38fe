"""Factors of few examples: matrices of low rank, and their damped inverses.

The factor of ``n`` rows has at most the rank ``n``, which is small against its size ``d`` early in
training of wide layers. Its range is found from products with random vectors (Halko, Martinsson and
Tropp, 2011, section 4.1), which is exact up to rounding, as there are more vectors than the rank.
With an orthonormal basis ``Q`` of it, and the core ``C = Q^T F Q``::

    F = Q C Q^T,  (F + s I)^-1 = I / s + Q ((C + s I)^-1 - I / s) Q^T

These are products of ``O(d^2 n)`` operations, of which another damping needs a third. A Cholesky
decomposition and its inverse take ``d^3``, at half the rate.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.diagonal_factor import is_diagonal
from einconv_kfac.curvature.devices.products import product

LEAST_SIZE = 256
"""Rows of a factor from which products are worth their calls."""
SMALLEST_QUOTIENT = 6
"""Size of a factor by the bound of its rank, from which products are faster. The first inversion
takes 0.8 of a decomposition's time with this quotient, 0.5 with 8 and 0.15 with 36; further ones of
the same factor take a quarter of that."""
MORE_VECTORS = 16
"""Vectors beyond the bound of the rank: with few, products of them lose digits."""
PROBES = 4
"""Vectors that are not part of the basis, whose products must be in its span."""
ROUNDING = 64.0
"""Largest part of these products that is outside of it, in units of rounding."""
SEED = 0
"""Seed of the vectors, so that a factor has the same inverse in a run that is resumed."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """Matrices ``Q C Q^T``.

    Args:
        basis: Orthonormal columns ``Q [g, d, r]``.
        core: ``C [g, r, r]``, symmetric.
    """

    basis: Tensor
    core: Tensor

    def inverse(self, core_inverse: Tensor, damping: Tensor) -> Tensor:
        """Return ``(Q C Q^T + damping I)^-1 [g, d, d]``, symmetric to the last bit.

        Args:
            core_inverse: ``(C + damping I)^-1``.
            damping: The damping, ``[g]``.
        """
        shift = damping.reciprocal().unsqueeze(-1)
        change = core_inverse.clone()
        change.diagonal(dim1=-2, dim2=-1).sub_(shift)
        half = product(product(self.basis, change / 2), self.basis.mT)
        inverse = half + half.mT
        inverse.diagonal(dim1=-2, dim2=-1).add_(shift)
        return inverse


class RankBound:
    """A bound on the rank of a factor, and its form of low rank, found when first asked for.

    Args:
        bound: The bound; ``None`` if none is known. A factor of a larger rank is left as it is.
    """

    def __init__(self, bound: int | None) -> None:
        self._bound = bound
        self._found: tuple[Tensor, LowRank | None] | None = None

    def form(self, factor: Tensor) -> LowRank | None:
        """Return the form of low rank of a factor ``[g, d, d]``, where that saves time."""
        if self._bound is None or not _is_low(factor, self._bound):
            return None
        if self._found is None or self._found[0] is not factor:
            self._found = factor, low_rank(factor, self._bound)
        return self._found[1]

    def anew(self) -> RankBound:
        """Return the bound alone, for another thread."""
        return RankBound(self._bound)


UNKNOWN = RankBound(None)
"""No bound."""


def _is_low(factor: Tensor, bound: int) -> bool:
    """Return whether products are faster than a decomposition, for a bound of the rank."""
    is_dense = factor.device.type == "cpu" and not is_diagonal(factor)
    return is_dense and factor.shape[-1] >= max(LEAST_SIZE, SMALLEST_QUOTIENT * bound)


def low_rank(factor: Tensor, bound: int) -> LowRank | None:
    """Return symmetric matrices ``[g, d, d]`` in their form of low rank; ``None`` if it is larger.

    Where random vectors show a part of the matrices that is beyond rounding, they are larger.

    Args:
        factor: The matrices, positive semidefinite.
        bound: The bound on their rank.
    """
    count = bound + MORE_VECTORS
    generator = torch.Generator().manual_seed(SEED)
    shape = len(factor), factor.shape[-1], count + PROBES
    vectors = torch.randn(shape, generator=generator, dtype=factor.dtype, device=factor.device)
    products = product(factor, vectors)
    basis, _ = torch.linalg.qr(products[..., :count])
    probes = products[..., count:]
    beyond = probes - product(basis, product(basis.mT, probes))
    allowed = ROUNDING * torch.finfo(factor.dtype).eps * torch.linalg.matrix_norm(probes)
    if not bool((torch.linalg.matrix_norm(beyond) <= allowed).all()):
        return None
    core = product(basis.mT, product(factor, basis))
    return LowRank(basis, (core + core.mT) / 2)

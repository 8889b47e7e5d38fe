"""Damped inverses of Kronecker factors by Cholesky decompositions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.batching import batched
from einconv_kfac.curvature.blocks.diagonal_factor import diagonal_of, is_diagonal

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A tensor for the factor ``A`` and one for the factor ``B``."""

RANGE_FRACTION = 2.0**-10
"""Largest damping of a factor, as a fraction of the largest number of its data type."""
DAMPING_GROWTH_AFTER_FAILURE = 10.0
"""Factor by which the damping of a layer grows where its Cholesky decomposition fails."""


@dataclass(frozen=True)
class DampedFactors:
    """Two factors, the damping of each, and the inverses of the damped factors.

    Args:
        factors: ``A [g, d, d]`` and ``B [g, co, co]``, in the dtype of the decompositions; a
            factor that is diagonal is ``[g, d]``, and so is its inverse.
        dampings: What is added to the diagonal of each, ``[g]``.
        inverses: ``(A + dampings[0] I)^-1`` and ``(B + dampings[1] I)^-1``.
        damping: The damping of the Kronecker product.
        retries: Number of attempts after the first.
    """

    factors: Pair
    dampings: Pair
    inverses: Pair
    damping: float
    retries: int = 0

    def conditions(self) -> Tensor:
        """Return the condition numbers in the 1-norm, ``[2]``, the largest of the groups."""
        found = []
        for factor, damping, inverse in zip(self.factors, self.dampings, self.inverses):
            norm = _one_norm(factor) + damping
            found.append((norm * _one_norm(inverse)).amax())
        return torch.stack(found)


def invert_damped(
    pairs: Sequence[Pair],
    dampings: Sequence[float],
    names: Sequence[str],
    *,
    damping_increases: int = 0,
) -> list[DampedFactors]:
    """Invert pairs of factors, with the damping of each pair split by trace balance.

    The inverses are ``(A + pi sqrt(l) I)^-1`` and ``(B + sqrt(l) / pi I)^-1`` for a damping
    ``l``, with ``pi`` of `split_damping`. A pair with a factor whose Cholesky decomposition fails,
    or whose inverse overflows, is inverted in float64.

    Args:
        pairs: ``A [g, d, d]`` and ``B [g, co, co]`` of each pair, or their diagonals.
        dampings: The damping ``l`` of each pair's Kronecker product.
        names: The name of each pair, for errors.
        damping_increases: How often the damping of a pair may grow, tenfold each time, where
            float64 fails as well.

    Raises:
        RuntimeError: If a damped factor is not positive definite at the last attempt, or its
            inverse is not finite in the dtype of the factors.
    """
    parts = [split_damping(pair, damping) for pair, damping in zip(pairs, dampings)]
    flat = [[own for pair in several for own in pair] for several in (pairs, parts)]
    found = damped_inverses(*flat)
    results = []
    for pair, part, damping, name, a, b in zip(
        pairs, parts, dampings, names, found[::2], found[1::2]
    ):
        if a is None or b is None:
            results.append(_in_float64(pair, damping, name, damping_increases))
        else:
            results.append(DampedFactors(pair, part, (a, b), damping))
    return results


def split_damping(factors: Pair, damping: float) -> Pair:
    """Split a damping ``l`` between two factors by trace balance, ``[g]`` each.

    The parts are ``pi sqrt(l)`` for ``A`` and ``sqrt(l) / pi`` for ``B``, with
    ``pi = sqrt((tr(A) / d) / (tr(B) / co))`` per group (Martens and Grosse, 2015). It is bounded
    so that neither part leaves the range of the data type, where a factor is zero or huge.
    """
    a, b = factors
    balance = _mean_eigenvalue(a).sqrt() / _mean_eigenvalue(b).sqrt()  # no overflow if B is 0
    root = damping**0.5
    if root:
        largest = torch.finfo(a.dtype).max * RANGE_FRACTION
        bound = min(largest / root, largest * root)  # of both parts, and of their reciprocals
        balance = balance.clamp(1 / bound, bound)
    return balance * root, root / balance


def damped_inverses(factors: Sequence[Tensor], dampings: Sequence[Tensor]) -> list[Tensor | None]:
    """Return ``(F + damping I)^-1`` for each factor, or ``None`` if Cholesky or its range fails.

    Args:
        factors: Factors ``[g, d, d]``, or their diagonals ``[g, d]``.
        dampings: Dampings ``[g]``.
    """
    found = batched(_damped_inverse, factors, dampings)
    return [None if bool(failures.any()) else inverse for inverse, failures in found]


def _in_float64(pair: Pair, damping: float, name: str, damping_increases: int) -> DampedFactors:
    """Invert a pair in float64, with a larger damping where that fails as well."""
    a, b = pair[0].double(), pair[1].double()
    for attempt in range(damping_increases + 1):
        increased = damping * DAMPING_GROWTH_AFTER_FAILURE**attempt
        dampings = split_damping((a, b), increased)
        left, right = (
            None if found is None or not bool(found.to(given).isfinite().all()) else found
            for found, given in zip(damped_inverses((a, b), dampings), pair)
        )
        if left is not None and right is not None:
            return DampedFactors((a, b), dampings, (left, right), increased, attempt + 1)
    letter, part = ("A", dampings[0]) if left is None else ("B", dampings[1])
    raise RuntimeError(
        f"The damped factor {letter} of {name} must be positive definite, but is not with damping "
        f"{float(part.min()):.3g}. A larger `damping` helps."
    )


def _damped_inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(factor + damping I)^-1`` per group, and whether that failed, ``[g]``.

    It fails where the damped factor is not positive definite, or the inverse is not finite.
    """
    if is_diagonal(factor):
        reciprocal = (factor + damping.unsqueeze(-1)).reciprocal()
        return reciprocal, ~((reciprocal > 0) & reciprocal.isfinite()).all(-1)
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    triangle, failures = torch.linalg.cholesky_ex(damped)
    failed = failures > 0
    if bool(failed.any()):  # an unfinished triangle cannot be inverted
        triangle[failed] = torch.eye(len(factor[0]), dtype=factor.dtype, device=factor.device)
    inverse = torch.cholesky_inverse(triangle)
    return inverse, failed | ~inverse.isfinite().flatten(1).all(-1)


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    """Return ``tr(F) / dim(F)`` per group, ``[g]``, positive."""
    mean = diagonal_of(factor).mean(dim=-1)
    return mean.clamp_min(torch.finfo(factor.dtype).tiny)


def _one_norm(factor: Tensor) -> Tensor:
    """Return the 1-norm per group, ``[g]``."""
    if is_diagonal(factor):
        return factor.abs().amax(-1)
    columns: Tensor = torch.linalg.vector_norm(factor, 1, dim=-1)
    return columns.amax(-1)

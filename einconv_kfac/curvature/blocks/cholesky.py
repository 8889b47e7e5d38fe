"""Damped inverses of Kronecker factors by Cholesky decompositions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.batching import LARGEST_BATCHED_DIMENSION
from einconv_kfac.curvature.blocks.damped_inverse import damped_inverse
from einconv_kfac.curvature.blocks.diagonal_factor import diagonal_of, is_diagonal
from einconv_kfac.curvature.blocks.low_rank import UNKNOWN, RankBound
from einconv_kfac.curvature.devices.late_numbers import LateNumbers

Pair: TypeAlias = tuple[Tensor, Tensor]
"""A tensor for the factor ``A`` and one for the factor ``B``."""
Bounds: TypeAlias = tuple[RankBound, RankBound]
"""Bounds on the ranks of a factor ``A`` and of a factor ``B``."""
UNKNOWN_RANKS: Bounds = (UNKNOWN, UNKNOWN)

RANGE_FRACTION = 2.0**-10
"""Largest damping of a factor, as a fraction of the largest number of its data type."""
NORM_SIZE = 1024
"""Rows of a factor from which its norm takes several operations on a CPU."""
NORM_ENTRIES = 1 << 20
"""Entries of a factor whose absolute values are computed at once, in memory that stays in a cache:
two to four times as fast as torch's norm along a dimension."""
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
        return self._by_group.amax(-1)

    @cached_property
    def _by_group(self) -> Tensor:
        """The condition numbers of each group, ``[2, g]``."""
        found = []
        for factor, damping, inverse in zip(self.factors, self.dampings, self.inverses):
            norm = _one_norm(factor) + damping
            found.append(norm * _one_norm(inverse))
        return torch.stack(found)

    def split(self, sizes: Sequence[int]) -> list[DampedFactors]:
        """Return the factors of several layers, whose groups follow each other here.

        Args:
            sizes: Number of groups of each layer.
        """
        if len(sizes) == 1:
            return [self]
        factors, dampings, inverses = (
            [(a, b) for a, b in zip(*(torch.split(own, list(sizes)) for own in pair))]
            for pair in (self.factors, self.dampings, self.inverses)
        )
        found = [
            DampedFactors(*own, damping=self.damping, retries=self.retries)
            for own in zip(factors, dampings, inverses)
        ]
        for own, conditions in zip(found, torch.split(self._by_group, list(sizes), dim=-1)):
            vars(own)["_by_group"] = conditions
        return found


def invert_damped(
    pairs: Sequence[Pair],
    dampings: Sequence[float],
    names: Sequence[str],
    *,
    damping_increases: int = 0,
    bounds: Sequence[Bounds] | None = None,
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
        bounds: Bounds on the ranks of each pair, where they are known.

    Raises:
        RuntimeError: If a damped factor is not positive definite at the last attempt, or its
            inverse is not finite in the dtype of the factors.
    """
    results: list[DampedFactors | None] = [None] * len(pairs)
    stacks = _stacks(pairs, dampings)
    ranks = bounds or [UNKNOWN_RANKS] * len(pairs)
    for indices, found in zip(stacks, _inverted(pairs, dampings, stacks, ranks)):
        parts: Sequence[DampedFactors | None] = [None]
        if found is not None:
            parts = found.split([len(pairs[index][0]) for index in indices])
        elif len(indices) > 1:
            parts = _inverted(pairs, dampings, [[index] for index in indices], ranks)
        for index, part in zip(indices, parts):
            results[index] = part
    return [
        _in_float64(pair, damping, name, damping_increases) if own is None else own
        for pair, damping, name, own in zip(pairs, dampings, names, results)
    ]


def _stacks(pairs: Sequence[Pair], dampings: Sequence[float]) -> list[list[int]]:
    """Return the indices of pairs that are inverted together: small ones of one form."""
    alike: dict[Hashable, list[int]] = defaultdict(list)
    for index, (pair, damping) in enumerate(zip(pairs, dampings)):
        is_small = all(own.shape[-1] <= LARGEST_BATCHED_DIMENSION for own in pair)
        form = tuple((own.shape[1:], own.dtype, own.device) for own in pair)
        alike[(form, damping) if is_small else index].append(index)
    return list(alike.values())


def _inverted(
    pairs: Sequence[Pair],
    dampings: Sequence[float],
    stacks: Sequence[Sequence[int]],
    bounds: Sequence[Bounds],
) -> list[DampedFactors | None]:
    """Return the inverses of each stack, as those of one pair, or ``None`` where one fails."""
    joined = [_joined([pairs[index] for index in indices]) for indices in stacks]
    own = [dampings[indices[0]] for indices in stacks]
    parts = [split_damping(pair, damping) for pair, damping in zip(joined, own)]
    factors, shares = ([each for pair in several for each in pair] for several in (joined, parts))
    ranks = [bound for indices in stacks for bound in bounds[indices[0]]]

    def of(inverses: Sequence[Tensor | None]) -> list[DampedFactors | None]:
        return [
            None if a is None or b is None else DampedFactors(pair, part, (a, b), damping)
            for pair, part, damping, a, b in zip(joined, parts, own, inverses[::2], inverses[1::2])
        ]

    if not all(factor.is_cuda for factor in factors):
        return of(damped_inverses(factors, shares, ranks))
    begun: list[DampedFactors | None] = []

    def meanwhile(inverses: Sequence[Tensor | None]) -> None:
        """Keep the device busy with what follows if no inverse failed."""
        begun.extend(of(inverses))
        for each in begun:
            assert each is not None
            _ = each._by_group

    found = damped_inverses(factors, shares, ranks, meanwhile)
    return begun if all(inverse is not None for inverse in found) else of(found)


def _joined(pairs: Sequence[Pair]) -> Pair:
    """Return pairs of one form as one, group after group."""
    if len(pairs) == 1:
        return pairs[0]
    a, b = (torch.cat(own) for own in zip(*pairs))
    return a, b


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


def damped_inverses(
    factors: Sequence[Tensor],
    dampings: Sequence[Tensor],
    bounds: Sequence[RankBound] = (),
    meanwhile: Callable[[Sequence[Tensor | None]], None] | None = None,
) -> list[Tensor | None]:
    """Return ``(F + damping I)^-1`` for each factor, or ``None`` if Cholesky or its range fails.

    The host waits for the device once.

    Args:
        factors: Factors ``[g, d, d]``, or their diagonals ``[g, d]``.
        dampings: Dampings ``[g]``.
        bounds: Bounds on the ranks of the factors, or none.
        meanwhile: Asks a GPU for more before the host waits, given inverses that may be wrong.
    """
    known = bounds or [UNKNOWN] * len(factors)
    found = [damped_inverse(*own) for own in zip(factors, dampings, known)]
    if not found:
        return []
    flag, inverses = _are_right(found), [inverse for inverse, _ in found]
    if meanwhile is not None:
        late = LateNumbers(flag.reshape(1))
        meanwhile(inverses)
    if bool(flag if meanwhile is None else late.read()[0]):
        return [*inverses]
    return [
        None if bool(failed.any()) or not bool(inverse.isfinite().all()) else inverse
        for inverse, failed in found
    ]


def _are_right(found: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Return whether no inverse failed, and the norms of all are finite; norms may overflow."""
    norms = torch._foreach_norm([inverse for inverse, _ in found])
    widest = max((norm.dtype for norm in norms), key=lambda dtype: dtype.itemsize)
    total = torch.stack([norm.to(widest) for norm in norms]).sum()
    return ~torch.cat([failed for _, failed in found]).any() & (total - total == 0)


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


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    """Return ``tr(F) / dim(F)`` per group, ``[g]``, positive."""
    mean = diagonal_of(factor).mean(dim=-1)
    return mean.clamp_min(torch.finfo(factor.dtype).tiny)


def _one_norm(factor: Tensor) -> Tensor:
    """Return the 1-norm per group, ``[g]``."""
    if is_diagonal(factor):
        return factor.abs().amax(-1)
    groups, size = factor.shape[:2]
    if factor.is_cuda or size < NORM_SIZE:
        columns: Tensor = torch.linalg.vector_norm(factor, 1, dim=-1)
        return columns.amax(-1)
    parts = torch.split(factor, max(1, NORM_ENTRIES // max(1, groups * size)), dim=-2)
    return torch.stack([part.abs().sum(-1).amax(-1) for part in parts]).amax(0)

"""Damped inverses of Kronecker factors."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

Pair: TypeAlias = tuple[Tensor, Tensor]
"""Something of the factors ``A`` and ``B``."""

BATCHED = 64
"""Largest dimension of matrices that are decomposed in one batch: on a CPU, batches were 1.7 to 6
times faster up to 32x32, 1.2 times at 64x64, and up to 2.5 times slower beyond."""


def damped_inverses(factors: Pair, damping: float, name: str) -> Pair:
    """Invert two factors with the damping split between them by trace balance.

    The result is ``(A + pi sqrt(l) I)^-1`` and ``(B + sqrt(l) / pi I)^-1`` as `balanced` splits.
    A factor whose Cholesky decomposition fails is inverted in float64, with a warning.

    Args:
        factors: ``A [g, d, d]`` and ``B [g, co, co]``.
        damping: The damping ``l`` of their Kronecker product.
        name: What they belong to, for messages.

    Raises:
        RuntimeError: If a damped factor is not positive definite in float64 either.
    """
    parts = balanced(factors, damping)
    found: list[Tensor] = []
    for letter, factor, part, first in zip("AB", factors, parts, inverses(factors, parts)):
        inverse = first
        if first is None:
            (inverse,) = inverses([factor.double()], [part.double()])
            if inverse is None:
                raise not_positive_definite(f"{letter} of {name}", float(part.min()))
            warnings.warn(
                f"The damped factor {letter} of {name} was inverted in float64, since "
                f"{factor.dtype} failed. A larger `damping` avoids this.",
                RuntimeWarning,
                stacklevel=3,
            )
        assert inverse is not None
        found.append(inverse.to(factor.dtype))
    return found[0], found[1]


def balanced(factors: Pair, damping: float) -> Pair:
    """Split a damping ``l`` between two factors by trace balance, ``[g]`` each.

    They are ``pi sqrt(l)`` for ``A`` and ``sqrt(l) / pi`` for ``B``, with
    ``pi = sqrt((tr(A) / d) / (tr(B) / co))`` per group (Martens and Grosse, 2015).
    """
    a, b = factors
    balance = _mean_eigenvalue(a).sqrt() / _mean_eigenvalue(b).sqrt()  # no overflow if B is 0
    root = damping**0.5
    return balance * root, root / balance


def inverses(factors: Sequence[Tensor], dampings: Sequence[Tensor]) -> list[Tensor | None]:
    """Return ``(F + damping I)^-1`` for each factor, or ``None`` if Cholesky fails.

    Args:
        factors: Factors ``[g, d, d]``.
        dampings: Dampings ``[g]``.
    """
    found = batched(_inverse, factors, dampings)
    return [None if bool(failures.any()) else inverse for inverse, failures in found]


def batched(
    function: Callable[..., tuple[Tensor, ...]], matrices: Sequence[Tensor], *rest: Sequence[Tensor]
) -> list[tuple[Tensor, ...]]:
    """Apply a function to each of many matrices ``[g, d, d]``, to small ones of a shape at once.

    Args:
        function: A function of matrices, and of more tensors, whose results all have the groups
            as their first dimension.
        matrices: The matrices.
        rest: The other arguments, with the groups first.
    """
    alike: dict[object, list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        size = matrix.shape[-1]
        alike[(size, matrix.dtype, matrix.device) if size <= BATCHED else index].append(index)
    results: dict[int, tuple[Tensor, ...]] = {}
    for indices in alike.values():
        arguments = [[operand[index] for index in indices] for operand in (matrices, *rest)]
        if len(indices) == 1:
            results[indices[0]] = function(*(own for (own,) in arguments))
            continue
        sizes = [len(matrices[index]) for index in indices]
        parts = function(*(torch.cat(own) for own in arguments))
        results.update(zip(indices, zip(*(torch.split(part, sizes) for part in parts))))
    return [results[index] for index in range(len(matrices))]


def _inverse(factor: Tensor, damping: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``(factor + damping I)^-1`` per group, and whether that failed, ``[g]``."""
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.unsqueeze(-1))
    triangle, failures = torch.linalg.cholesky_ex(damped)
    failed = failures > 0
    if bool(failed.any()):  # what is left there cannot be inverted
        triangle[failed] = torch.eye(len(factor[0]), dtype=factor.dtype, device=factor.device)
    return torch.cholesky_inverse(triangle), failed


def not_positive_definite(name: str, damping: float) -> RuntimeError:
    """Return the error of a damped factor that cannot be inverted."""
    return RuntimeError(
        f"The damped factor {name} must be positive definite, but is not with damping "
        f"{damping:.3g}. A larger `damping` helps."
    )


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    """Return ``tr(F) / dim(F)`` per group, ``[g]``, positive."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return mean.clamp_min(torch.finfo(factor.dtype).tiny)

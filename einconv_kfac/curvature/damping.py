"""Damped inverses of Kronecker factors."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor


def damped_inverses(
    factors: tuple[Tensor, Tensor], damping: float, name: str
) -> tuple[Tensor, Tensor]:
    """Invert two factors with the damping split between them by trace balance.

    The result is ``(A + pi sqrt(l) I)^-1`` and ``(B + sqrt(l) / pi I)^-1`` with
    ``pi = sqrt((tr(A) / d) / (tr(B) / co))`` per group (Martens and Grosse, 2015).
    A factor whose Cholesky decomposition fails is inverted in float64, with a warning.

    Args:
        factors: ``A [g, d, d]`` and ``B [g, co, co]``.
        damping: The damping ``l`` of their Kronecker product.
        name: What they belong to, for messages.

    Raises:
        RuntimeError: If a damped factor is not positive definite in float64 either.
    """
    a, b = factors
    balance = (_mean_eigenvalue(a) / _mean_eigenvalue(b)).sqrt()[:, None, None]
    root = damping**0.5
    return _inverse(a, balance * root, f"A of {name}"), _inverse(b, root / balance, f"B of {name}")


def _inverse(factor: Tensor, damping: Tensor, name: str) -> Tensor:
    """Return ``(factor + damping I)^-1`` per group."""
    triangle, failures = torch.linalg.cholesky_ex(_damped(factor, damping))
    if failures.any():
        precise = _damped(factor.double(), damping.double())
        triangle, failures = torch.linalg.cholesky_ex(precise)
        if failures.any():
            raise RuntimeError(
                f"The damped factor {name} must be positive definite, but is not with damping "
                f"{float(damping.min()):.3g}. A larger `damping` helps."
            )
        warnings.warn(
            f"The damped factor {name} was inverted in float64, since {factor.dtype} failed. "
            "A larger `damping` avoids this.",
            RuntimeWarning,
            stacklevel=4,
        )
    return torch.cholesky_inverse(triangle).to(factor.dtype)


def _damped(factor: Tensor, damping: Tensor) -> Tensor:
    """Return ``factor + damping I`` for a damping ``[g, 1, 1]`` per group."""
    damped = factor.clone()
    damped.diagonal(dim1=-2, dim2=-1).add_(damping.squeeze(-1))
    return damped


def _mean_eigenvalue(factor: Tensor) -> Tensor:
    """Return ``tr(F) / dim(F)`` per group, ``[g]``, positive."""
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(dim=-1)
    return mean.clamp_min(torch.finfo(factor.dtype).tiny)

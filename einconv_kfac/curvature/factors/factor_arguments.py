"""Checks of the arguments that the functions of factors share."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.curvature.arguments import number, real_tensor
from einconv_kfac.curvature.factors.symmetric.update import Target


def checked_target(out: Tensor | None, beta: float, alpha: float) -> Target:
    """Return the target that arguments describe.

    Raises:
        TypeError: If ``out`` is no tensor.
        ValueError: If it is sparse or not real, or a multiplier is no real number.
    """
    found = None if out is None else real_tensor("out", out)
    multipliers = number("beta", beta, finite=False), number("alpha", alpha, finite=False)
    return Target(found, *multipliers)


def batch_of(x: Tensor, ndim: int, name: str) -> Tensor:
    """Return a layer's input, which must have entries and at least ``ndim`` dimensions."""
    if real_tensor(name, x).ndim < ndim or x.numel() == 0:
        raise ValueError(
            f"`{name}` must be a non-empty batch with at least {ndim} dimensions, got shape "
            f"{tuple(x.shape)}."
        )
    return x

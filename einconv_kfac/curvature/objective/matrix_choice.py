"""Matrices that serve as the curvature of a loss of entries of distributions.

Let ``f`` be a loss as a function of the entries ``l = log p`` of several softmaxes, with the
gradient ``G`` and a Hessian ``F`` in which entries of one place alone are related. With
``P = I - 1 p^T``, ``w = -sum(G)`` over the classes, and the part ``c`` of ``G`` that is linear in
``l`` by itself, the curvature by the scores is ``P^T M P`` with the first of these matrices that
serves:

- ``F + w p``, the Hessian, if it is positive semi-definite;
- ``F - (G - c) - sum(c) p``, a Gauss-Newton matrix: the Hessian of the nonlinear part by the
  probabilities, and that of the linear part, a cross entropy, by the scores. It must be positive
  semi-definite, and have curvature for every class, unlike that of a function of one probability;
- the first without its negative part, if that is small;
- the second, if it is positive semi-definite.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING = 1e-5
"""Negative eigenvalues, relative to the largest of a distribution, that are taken for rounding."""
LARGEST_NEGATIVE = 2 / 3
"""Negative part of the Hessian by scores that is left out, relative to the positive part."""


def chosen_roots(
    p: Tensor, gradient: Tensor, linear: Tensor, hessian: Tensor, dim: int
) -> Tensor | None:
    """Return roots ``[*a, K, K]`` of the matrices that serve, see the text of this file.

    ``None`` if there is none for a distribution, or all are zero.

    Args:
        p: The probabilities, ``[*a, K]``.
        gradient: ``G``, ``[*a, K]``.
        linear: ``c``, ``[*a, K]``.
        hessian: ``F``, ``[*a, K, K]``.
        dim: The dimension of the classes, not negative.
    """
    classes, tensors = p.shape[dim], p.shape[-1]
    shape = hessian.movedim(dim, -3).shape
    p, gradient, linear = (
        each.movedim(dim, -2).reshape(-1, classes, tensors).double()
        for each in (p, gradient, linear)
    )
    hessian = hessian.movedim(dim, -3).reshape(-1, classes, tensors, tensors).double()
    by_scores = hessian - (gradient.sum(-2, keepdim=True) * p).diag_embed()
    of_linear = (-linear.sum(-2, keepdim=True) * p).diag_embed()
    by_probabilities = hessian - (gradient - linear).diag_embed() + of_linear
    is_bare = _is_bare(by_probabilities, p)
    roots, is_left = torch.zeros_like(hessian), torch.ones_like(is_bare)
    choices = (
        (by_scores, _is_semidefinite),
        (by_probabilities, lambda values: _is_semidefinite(values) & ~is_bare[is_left]),
        (by_scores, _is_mostly_positive),
        (by_probabilities, _is_semidefinite),
    )
    for matrices, serves in choices:
        left = is_left.nonzero().squeeze(-1)
        if not len(left):
            break
        values, vectors = _eigen(matrices[left])
        taken = serves(values)
        own = vectors * values.clamp_min(0).sqrt().unsqueeze(-2)
        roots[left[taken]] = own[taken]
        is_left[left[taken]] = False
    if bool(is_left.any()) or not bool(roots.any()):
        return None
    return roots.reshape(shape).movedim(-3, dim)


def _eigen(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenvalues and eigenvectors of symmetric matrices ``[*b, K, K]``."""
    if matrices.shape[-1] == 1:
        return matrices.squeeze(-1), torch.ones_like(matrices)
    values, vectors = torch.linalg.eigh(matrices)
    return values, vectors


def _is_semidefinite(values: Tensor) -> Tensor:
    """Return whether no eigenvalue ``[u, c, K]`` of a distribution is negative, ``[u]``."""
    return values.flatten(1).amin(1) >= -ROUNDING * values.abs().flatten(1).amax(1)


def _is_mostly_positive(values: Tensor) -> Tensor:
    """Return whether negative eigenvalues ``[u, c, K]`` are small beside the others, ``[u]``."""
    flat = values.flatten(1)
    return flat.clamp_max(0).sum(1).abs() <= LARGEST_NEGATIVE * flat.clamp_min(0).sum(1)


def _is_bare(matrices: Tensor, p: Tensor) -> Tensor:
    """Return whether some class of a distribution has no curvature, ``[u]``."""
    shares = matrices.diagonal(dim1=-2, dim2=-1) / p
    present = shares.where(p > 0, torch.inf).flatten(1).amin(1)
    return present <= ROUNDING * shares.where(p > 0, 0).flatten(1).amax(1)

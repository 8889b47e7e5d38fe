"""The gradient-based factors ``B``."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import positive_integer, real_tensor
from einconv_kfac.curvature.factors.approximation import weight_sharing
from einconv_kfac.curvature.factors.columns import ChannelColumns
from einconv_kfac.curvature.factors.factor_arguments import checked_target
from einconv_kfac.curvature.factors.precision import Precision, rounded


def output_factor(
    g: Tensor,
    groups: int = 1,
    approximation: str = "expand",
    *,
    precision: Precision = "full",
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the gradient-based Kronecker factor of a layer with channels last.

    For each group, ``B = 1/(N S) sum_{v,n,s} g g^T`` (expand; KFC, Grosse and Martens, 2016), or
    ``B = 1/N sum_{v,n} gsum gsum^T`` with ``gsum = sum_s g`` (reduce; Eschenhagen et al., 2023).

    Args:
        g: Gradients of the per-example losses, of shape ``[V, N, S, C_out]``. Outer products are
            summed over ``v``, so each of ``V`` Monte-Carlo draws must be scaled by
            ``1 / sqrt(V)``.
        groups: Number of channel groups.
        approximation: ``"expand"`` or ``"reduce"``.
        precision: As in `conv_input_factor`, for the gradients.
        out: Tensor to update and return: ``out <- beta * out + alpha * B``.
        beta: Multiplier of the old values of ``out``.
        alpha: Multiplier of the factor.

    Returns:
        Factors of shape ``[groups, C_out / groups, C_out / groups]``, symmetric to the last
        bit; of the gradients' dtype, float32 if that is smaller.

    Raises:
        ValueError: If ``g`` has another number of dimensions or is empty, if the groups do not
            divide the channels, or if the approximation, the precision or ``out`` is invalid.

    >>> output_factor(torch.tensor([[[[1.0, 2.0]], [[3.0, 0.0]]]]))
    tensor([[[5., 1.],
             [1., 2.]]])
    """
    if real_tensor("g", g).ndim != 4:
        raise ValueError(f"`g` must have shape [V, N, S, C_out], got {tuple(g.shape)}.")
    return conv_output_factor(
        g.movedim(3, 2),
        groups,
        approximation,
        precision=precision,
        out=out,
        beta=beta,
        alpha=alpha,
    )


@torch.no_grad()
def conv_output_factor(
    g: Tensor,
    groups: int = 1,
    approximation: str = "expand",
    *,
    precision: Precision = "full",
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the gradient-based Kronecker factor of a layer with channels first.

    Args:
        g: As in `output_factor`, of shape ``[V, N, C_out, *o]``.
        groups: See `output_factor`, as for the arguments that follow.
        approximation: See `output_factor`.
        precision: See `output_factor`.
        out: See `output_factor`.
        beta: See `output_factor`.
        alpha: See `output_factor`.

    Returns:
        See `output_factor`.

    Raises:
        ValueError: See `output_factor`.

    >>> conv_output_factor(torch.ones(1, 2, 4, 3, 3), groups=2, approximation="reduce").shape
    torch.Size([2, 2, 2])
    """
    sharing = weight_sharing(approximation)
    if real_tensor("g", g).ndim < 3 or g.numel() == 0:
        raise ValueError(f"`g` must be non-empty [V, N, C_out, *o], got {tuple(g.shape)}.")
    n, channels = g.shape[1:3]
    if channels % (groups := positive_integer("groups", groups)):
        raise ValueError(f"`g`'s channels must be divisible by groups={groups}, got {channels}.")
    columns = ChannelColumns(rounded(g, precision).flatten(0, 1), groups)  # (v n) (g c) *o
    terms = sharing.term_count(n, columns.positions)
    return sharing.factor(columns, checked_target(out, beta, alpha).averaged(terms))

"""The two approximations of weight sharing, in terms of columns ``[n, g, d, s]``.

A layer is a linear map that ``s`` positions share. ``"expand"`` (KFC; Grosse and Martens, 2016)
treats the positions of an example as independent, ``"reduce"`` (Eschenhagen et al., 2023) as
one. Every difference between the two is in this file.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

Approximation: TypeAlias = Literal["expand", "reduce"]
_Call = TypeVar("_Call")


def shared_inputs(a: Tensor, approximation: Approximation) -> Tensor:
    """Return the inputs whose outer products are summed: ``a [n, g, d, s]`` or its mean over s."""
    return a.mean(-1, keepdim=True) if approximation == "reduce" else a


def shared_gradients(g: Tensor, approximation: Approximation) -> Tensor:
    """Return the gradients whose outer products are summed: ``g [n, g, co, s]`` or its sum."""
    return g.sum(-1, keepdim=True) if approximation == "reduce" else g


def term_count(examples: int, positions: int, approximation: Approximation) -> int:
    """Return the number of outer products that ``B`` is averaged over."""
    return examples if approximation == "reduce" else examples * positions


def joined(calls: Sequence[_Call], approximation: Approximation) -> list[list[_Call]]:
    """Return the calls of a layer in lists whose positions are averaged or summed together."""
    return [list(calls)] if approximation == "reduce" else [[call] for call in calls]


def with_ones(a: Tensor) -> Tensor:
    """Append a constant 1, the input of the bias, to ``a [n, g, d, *s]`` along ``d``."""
    return torch.cat([a, torch.ones_like(a[:, :, :1])], dim=2)


def second_moment(
    columns: Tensor,
    terms: int,
    *,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return ``beta * out + alpha / terms * sum_{n,s} a a^T`` for ``a [n, g, d, s]``."""
    dtype = torch.promote_types(columns.dtype, torch.float32)
    a = columns.detach().to(dtype).permute(1, 2, 0, 3).flatten(2)
    if out is None:
        return torch.bmm(a, a.mT).mul_(alpha / terms)
    return out.baddbmm_(a, a.mT, beta=beta, alpha=alpha / terms)

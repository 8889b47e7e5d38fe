"""The two approximations of weight sharing, in terms of columns ``[n, g, d, s]``.

A layer is a linear map that ``s`` positions share. ``"expand"`` (KFC; Grosse and Martens, 2016)
treats the positions of an example as independent, ``"reduce"`` (Eschenhagen et al., 2023) as
one. Every difference between the two is in this file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, Protocol, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import choice
from einconv_kfac.curvature.factors.columns import Columns
from einconv_kfac.curvature.factors.one_product import is_one_product, one_product
from einconv_kfac.curvature.factors.reduce import reduced_factor
from einconv_kfac.curvature.factors.symmetric.update import (
    Target,
    Update,
    accumulation_dtype,
    prepare,
)

Approximation: TypeAlias = Literal["expand", "reduce"]
APPROXIMATIONS: tuple[str, ...] = get_args(Approximation)
_Call = TypeVar("_Call")


class WeightSharing(Protocol):
    """How the positions of an example enter the factors."""

    has_algorithms: bool
    """Whether `factor` has several algorithms to choose from."""

    def inputs(self, a: Tensor) -> Tensor:
        """Return the inputs whose outer products are summed, from ``a [n, g, d, s]``."""

    def gradients(self, g: Tensor) -> Tensor:
        """Return the gradients whose outer products are summed, from ``g [n, g, co, s]``."""

    def term_count(self, examples: int, positions: int) -> int:
        """Return the number of outer products that ``B`` is averaged over."""

    def joined(self, calls: Sequence[_Call]) -> list[list[_Call]]:
        """Return the calls of a layer in lists whose positions are averaged or summed together."""

    def factor(
        self, columns: Columns, target: Target, *, bias: bool = False, divisor: int = 1
    ) -> Tensor:
        """Return ``beta * out + alpha * sum a a^T`` per group, ``[g, d, d]``.

        Args:
            columns: The columns; they are neither copied nor unfolded as a whole.
            target: The factors to update, with ``beta`` and ``alpha``.
            bias: Whether each ``a`` ends in a constant 1.
            divisor: Divisor of sums over positions: their number for a mean, 1 for a sum.
        """


class Expand:
    """Each position contributes an outer product of its own."""

    has_algorithms = True

    def inputs(self, a: Tensor) -> Tensor:
        """See `WeightSharing`; every position is kept."""
        return a

    def gradients(self, g: Tensor) -> Tensor:
        """See `WeightSharing`; every position is kept."""
        return g

    def term_count(self, examples: int, positions: int) -> int:
        """See `WeightSharing`; one for each example and position."""
        return examples * positions

    def joined(self, calls: Sequence[_Call]) -> list[list[_Call]]:
        """See `WeightSharing`; each call is a list of its own."""
        return [[call] for call in calls]

    def factor(
        self, columns: Columns, target: Target, *, bias: bool = False, divisor: int = 1
    ) -> Tensor:
        """See `WeightSharing`; nothing is summed over positions, so ``divisor`` has no effect."""
        size = columns.size
        if is_one_product(columns.like, columns.examples, size, columns.positions):
            a = columns.existing()
            found = None if a is None else one_product(a, target, bias)
            if found is not None:
                return found
        update = prepare(columns.like, (columns.groups, size + bias), target)
        columns.add_(update.within(size))
        if bias:
            _append_ones_(columns, update)
        return update.out


class Reduce:
    """Inputs are averaged and gradients are summed over the positions of an example first."""

    has_algorithms = False

    def inputs(self, a: Tensor) -> Tensor:
        """See `WeightSharing`; the mean over positions."""
        return a.mean(-1, keepdim=True)

    def gradients(self, g: Tensor) -> Tensor:
        """See `WeightSharing`; the sum over positions."""
        return g.sum(-1, keepdim=True)

    def term_count(self, examples: int, positions: int) -> int:
        """See `WeightSharing`; one for each example."""
        return examples

    def joined(self, calls: Sequence[_Call]) -> list[list[_Call]]:
        """See `WeightSharing`; all calls are in one list."""
        return [list(calls)]

    def factor(
        self, columns: Columns, target: Target, *, bias: bool = False, divisor: int = 1
    ) -> Tensor:
        """See `WeightSharing`."""
        sums = columns.position_sums(accumulation_dtype(columns.like.dtype))
        return reduced_factor(sums, divisor, columns.groups, target, bias=bias)


_WEIGHT_SHARING: Mapping[str, WeightSharing] = {"expand": Expand(), "reduce": Reduce()}


def weight_sharing(approximation: str, algorithm: str | None = None) -> WeightSharing:
    """Return the approximation of that name.

    Raises:
        ValueError: If it is not one of `APPROXIMATIONS`, or if an algorithm is given although
            the approximation has only one.
    """
    found = _WEIGHT_SHARING[choice("approximation", approximation, APPROXIMATIONS)]
    if algorithm is not None and not found.has_algorithms:
        raise ValueError(f"`algorithm` must be None for {approximation!r}, got {algorithm!r}.")
    return found


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


def squares(
    columns: Tensor,
    terms: int,
    *,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return the diagonal of `second_moment`, ``[g, d]``, without the matrices."""
    a = columns.detach().to(torch.promote_types(columns.dtype, torch.float32))
    return updated(a.square().sum((0, 3)), out=out, beta=beta, alpha=alpha / terms)


def updated(
    value: Tensor, *, out: Tensor | None = None, beta: float = 0.0, alpha: float = 1.0
) -> Tensor:
    """Return ``beta * out + alpha * value``, in place."""
    return value.mul_(alpha) if out is None else out.mul_(beta).add_(value, alpha=alpha)


def _append_ones_(columns: Columns, update: Update) -> None:
    """Update the last row and column, which are those of a constant 1.

    The columns are read once more for it. A column of ones in the product would need a copy of
    the input, and a product of the input with a vector of ones takes longer than a sum.
    """
    groups, size = columns.groups, columns.size
    column = columns.total(update.out.dtype).view(groups, size)
    update.set_(column, update.out[:, :size, size])
    update.out[:, size, :size] = update.out[:, :size, size]
    corner = column.new_full((groups,), columns.positions * columns.examples)
    update.set_(corner, update.out[:, size, size])

"""``inverse="factored"``: damping split between the factors, Cholesky decompositions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import invert_damped
from einconv_kfac.curvature.blocks.diagonal_factor import times, times_on_right
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.devices.products import product, product_of_three
from einconv_kfac.optim.definiteness import semidefinite_of
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, LayerInverse, Task
from einconv_kfac.optim.state_schema import NOT_NEGATIVE, Record, Schema, constant

MOST_DAMPING_INCREASES = 6
"""How often the damping of a layer grows after failures before the failure is an error."""


@dataclass(frozen=True, eq=False)
class FactoredInverse(LayerInverse):
    """``(B + sqrt(l) / pi I)^-1 (x) (A + pi sqrt(l) I)^-1``, see `split_damping` for ``pi``.

    Args:
        a: Inverse of damped ``A [g, d, d]``; its diagonal ``[g, d]`` if ``A`` is diagonal.
        b: Inverse of damped ``B [g, co, co]``, or its diagonal.
        damping: The damping ``l``.
    """

    kind = "factored"
    a: Tensor
    b: Tensor
    damping: float

    def apply(self, rows: Tensor) -> Tensor:
        """See `LayerInverse`."""
        rows = rows.to(self.a.dtype)
        if self.a.ndim == self.b.ndim == rows.ndim:  # none is kept as its diagonal
            return product_of_three(self.b, rows, self.a)
        return times(self.b, times_on_right(rows, self.a, product), product)

    @property
    def form(self) -> Hashable:
        """See `LayerInverse`."""
        return self.kind, self.a.shape[1:], self.b.shape[1:], self.a.dtype, self.b.dtype

    def joined(self, others: Sequence[LayerInverse]) -> FactoredInverse:
        """See `LayerInverse`."""
        every = [self, *(other for other in others if isinstance(other, FactoredInverse))]
        a, b = torch.cat([own.a for own in every]), torch.cat([own.b for own in every])
        return replace(self, a=a, b=b)

    def to(self, device: torch.device) -> FactoredInverse:
        """See `LayerInverse`."""
        if self.a.device == device:
            return self
        return replace(self, a=self.a.to(device), b=self.b.to(device))

    def state_dict(self) -> dict[str, Any]:
        """See `LayerInverse`."""
        return {"kind": self.kind, "a": self.a, "b": self.b, "damping": self.damping}


def _invert(tasks: Sequence[Task]) -> list[Inverted]:
    """Return inverses with factored damping."""
    found = invert_damped(
        [task.factors for task in tasks],
        [task.damping for task in tasks],
        [f"'{task.name}'" for task in tasks],
        damping_increases=MOST_DAMPING_INCREASES,
        bounds=[task.bounds for task in tasks],
    )
    results = []
    for task, damped in zip(tasks, found):
        like = task.factors[0]
        a, b = (inverse.to(like) for inverse in damped.inverses)
        inverse = FactoredInverse(a, b, damped.damping)
        results.append(Inverted(inverse, damped.conditions().to(like), damped.retries))
    return results


def _load(state: dict[str, Any], layout: Layout) -> FactoredInverse:
    """Return the inverse that a state describes."""
    return FactoredInverse(**state)


def _schema(layout: Layout, shapes: Sequence[Sequence[int]]) -> Schema:
    """Return what a state must be."""
    a, b = (semidefinite_of(shape) for shape in shapes)
    return Record({"kind": constant(FactoredInverse.kind), "a": a, "b": b, "damping": NOT_NEGATIVE})


KIND = Kind(FactoredInverse.kind, _invert, _load, damping_needs_decomposition=True, schema=_schema)

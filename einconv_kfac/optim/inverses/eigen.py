"""``inverse="exact"``: damping of the Kronecker product, eigendecompositions."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.eigen import EigenBlock, decompositions
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.devices.products import product
from einconv_kfac.optim.definiteness import orthonormal_of
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, LayerInverse, Task
from einconv_kfac.optim.state_schema import (
    NOT_NEGATIVE,
    NOTHING,
    OneType,
    Record,
    Schema,
    constant,
    squares_of,
)

DENSE_DIMS = 3
"""Number of dimensions of a factor ``[g, d, d]``; a diagonal ``[g, d]`` has no eigenbasis."""


@dataclass(frozen=True, eq=False)
class EigenInverse(LayerInverse):
    """``(B (x) A + damping I)^-1`` by eigendecompositions of ``A`` and ``B``.

    Args:
        block: Eigenvalues and eigenvectors of ``B (x) A``.
        damping: The damping.
    """

    kind = "exact"
    block: EigenBlock
    damping: float

    def apply(self, rows: Tensor) -> Tensor:
        """See `LayerInverse`."""
        a, b, values = self.block.basis_a, self.block.basis_b, self.block.values
        rows = rows.to(values.dtype if a is None else a.dtype)
        rows = rows if b is None else product(b.mT, rows)
        rows = rows if a is None else product(rows, a)
        damping = max(self.damping, torch.finfo(rows.dtype).tiny)  # 0 / 0 where both underflow
        rows = rows / (values.to(rows.dtype) + damping)
        rows = rows if b is None else product(b, rows)
        return rows if a is None else product(rows, a.mT)

    @property
    def form(self) -> Hashable:
        """See `LayerInverse`."""
        parts = self._parts()
        shapes = [None if part is None else (part.shape[1:], part.dtype) for part in parts]
        return self.kind, self.damping, *shapes

    def joined(self, others: Sequence[LayerInverse]) -> EigenInverse:
        """See `LayerInverse`; the layout of the block stays that of the first."""
        every = [self, *(other for other in others if isinstance(other, EigenInverse))]
        a, b, values = (_joined(parts) for parts in zip(*(own._parts() for own in every)))
        assert values is not None
        return replace(self, block=EigenBlock(a, b, values, self.block.layout))

    def _parts(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the bases and the eigenvalues."""
        return self.block.basis_a, self.block.basis_b, self.block.values

    def to(self, device: torch.device) -> EigenInverse:
        """See `LayerInverse`."""
        if self.block.values.device == device:
            return self
        return replace(self, block=self.block.to(device))

    def with_damping(self, damping: float) -> EigenInverse:
        """See `LayerInverse`."""
        return replace(self, damping=damping)

    def state_dict(self) -> dict[str, Any]:
        """See `LayerInverse`."""
        names = ("basis_a", "basis_b", "values")  # the layout is the layer's
        tensors = {name: getattr(self.block, name) for name in names}
        return {"kind": self.kind, "damping": self.damping, **tensors}


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors as one, group after group; ``None`` if there are none."""
    known = [part for part in parts if part is not None]
    return torch.cat(known) if known else None


def invert_by_eigh(inverse: type[EigenInverse], tasks: Sequence[Task]) -> list[Inverted]:
    """Return inverses of a type, from an eigendecomposition of every factor.

    Raises:
        RuntimeError: If one cannot be decomposed.
    """
    factors = [factor for task in tasks for factor in task.factors]
    names = [f"the factor {letter} of '{task.name}'" for task in tasks for letter in "AB"]
    parts = decompositions(factors, names)
    results = []
    for task, (a, basis_a), (b, basis_b) in zip(tasks, parts[::2], parts[1::2]):
        block = EigenBlock(basis_a, basis_b, b[:, :, None] * a[:, None, :], task.layout)
        conditions = torch.stack([_condition(v) for v in (a, b)])
        results.append(Inverted(inverse(block, task.damping), conditions))
    return results


def _condition(values: Tensor) -> Tensor:
    """Return the largest condition number of matrices with eigenvalues ``[g, d]``."""
    largest, smallest = values.amax(-1), values.amin(-1)
    return torch.where(smallest > 0, largest / smallest, torch.inf).amax()


def load_eigen(inverse: type[EigenInverse], state: dict[str, Any], layout: Layout) -> EigenInverse:
    """Return the inverse of a type that a state describes."""
    block = EigenBlock(state.pop("basis_a"), state.pop("basis_b"), state.pop("values"), layout)
    return inverse(block, **state)


def eigen_schema(
    kind: str, layout: Layout, shapes: Sequence[Sequence[int]], **others: Schema
) -> Schema:
    """Return what the state of an inverse must be.

    Args:
        kind: Name of its kind.
        layout: The layer's parameters.
        shapes: The shapes of its factors.
        others: Entries beside those of `EigenInverse`.
    """
    a, b = (orthonormal_of(s) if len(s) == DENSE_DIMS else NOTHING for s in shapes)
    own: dict[str, Schema] = {"basis_a": a, "basis_b": b, "values": squares_of(layout.shape)}
    return OneType(Record({"kind": constant(kind), "damping": NOT_NEGATIVE, **own, **others}))


KIND = Kind(
    EigenInverse.kind,
    partial(invert_by_eigh, EigenInverse),
    partial(load_eigen, EigenInverse),
    damping_needs_decomposition=False,
    schema=partial(eigen_schema, EigenInverse.kind),
)

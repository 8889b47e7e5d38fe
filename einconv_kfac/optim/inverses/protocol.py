"""Damped inverses of a layer's curvature, as what is applied to its gradient."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.devices.products import product

Inverse: TypeAlias = Literal["factored", "exact", "ekfac"]


class LayerInverse(Protocol):
    """The damped inverse of one layer's curvature."""

    @property
    def damping(self) -> float:
        """The damping."""

    @property
    def basis(self) -> EigenBlock | None:
        """The eigenbasis in which squared gradients are wanted, if they are."""

    def apply(self, rows: Tensor) -> Tensor:
        """Return the inverse times matrices ``[g, co, d]``."""

    def damped(self, damping: float) -> LayerInverse:
        """Return the inverse with another damping if that costs nothing, else the same."""

    def following(self, previous: LayerInverse | None) -> LayerInverse:
        """Return the inverse with what the previous one has learned."""

    def corrected(self, squares: Tensor, decay: float) -> LayerInverse:
        """Return the inverse after squared gradients ``[g, co, d]`` in its `basis`."""

    def to(self, device: torch.device) -> LayerInverse:
        """Return the inverse on a device."""

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and numbers from which `inverse_of` makes a copy."""


@dataclass(frozen=True, eq=False)
class FactoredInverse:
    """``(B + sqrt(l) / pi I)^-1 (x) (A + pi sqrt(l) I)^-1``, as `balanced` splits the damping.

    Args:
        a: Inverse of damped ``A [g, d, d]``.
        b: Inverse of damped ``B [g, co, co]``.
        damping: The damping ``l``.
    """

    a: Tensor
    b: Tensor
    damping: float
    basis = None

    def apply(self, rows: Tensor) -> Tensor:
        """See `LayerInverse`."""
        return product(self.b, product(rows.to(self.a.dtype), self.a))

    def damped(self, damping: float) -> FactoredInverse:
        """Return itself: another damping needs another decomposition."""
        return self

    def following(self, previous: LayerInverse | None) -> FactoredInverse:
        """See `LayerInverse`."""
        return self

    def corrected(self, squares: Tensor, decay: float) -> FactoredInverse:
        """See `LayerInverse`."""
        return self

    def to(self, device: torch.device) -> FactoredInverse:
        """See `LayerInverse`."""
        known = self.a.device == device
        return self if known else replace(self, a=self.a.to(device), b=self.b.to(device))

    def state_dict(self) -> dict[str, Any]:
        """See `LayerInverse`."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}


@dataclass(frozen=True, eq=False)
class EigenInverse:
    """``(B (x) A + damping I)^-1`` by eigendecompositions of ``A`` and ``B``.

    Args:
        block: Eigenvalues and eigenvectors of ``B (x) A``.
        damping: The damping.
    """

    block: EigenBlock
    damping: float

    @property
    def basis(self) -> EigenBlock | None:
        """See `LayerInverse`."""
        return None

    def apply(self, rows: Tensor) -> Tensor:
        """See `LayerInverse`."""
        a, b = self.block.basis_a, self.block.basis_b
        assert a is not None
        assert b is not None
        rotated = product(product(b.mT, rows.to(a.dtype)), a)
        return product(product(b, rotated.div_(self.block.values + self.damping)), a.mT)

    def damped(self, damping: float) -> EigenInverse:
        """See `LayerInverse`."""
        return replace(self, damping=damping)

    def following(self, previous: LayerInverse | None) -> EigenInverse:
        """See `LayerInverse`."""
        return self

    def corrected(self, squares: Tensor, decay: float) -> EigenInverse:
        """See `LayerInverse`."""
        return self

    def to(self, device: torch.device) -> EigenInverse:
        """See `LayerInverse`."""
        known = self.block.values.device == device
        return self if known else replace(self, block=self.block.to(device))

    def state_dict(self) -> dict[str, Any]:
        """See `LayerInverse`."""
        own = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        block = own.pop("block")
        tensors = {name: getattr(block, name) for name in ("basis_a", "basis_b", "values")}
        return {**tensors, **own}


@dataclass(frozen=True, eq=False)
class CorrectedInverse(EigenInverse):
    """An inverse whose eigenvalues are second moments of gradients (George et al., 2018).

    They are bias-corrected running averages of the squared gradients of single examples in the
    eigenbasis of ``B (x) A``; until there are any, they are the eigenvalues of ``B (x) A``.

    Args:
        updates: Number of updates of the averages.
    """

    updates: int = 0

    @property
    def basis(self) -> EigenBlock:
        """See `LayerInverse`."""
        return self.block

    def following(self, previous: LayerInverse | None) -> CorrectedInverse:
        """Take over the averages of the previous basis, as they look in this one.

        With ``Q_A = U_A^T V_A`` from the previous basis ``V`` to this one, and ``Q_B`` alike,
        the curvature ``V diag(s) V^T`` has the diagonal ``Q_B^2 s (Q_A^2)^T`` here, with
        squares of entries; its trace stays.
        """
        if not isinstance(previous, CorrectedInverse) or not previous.updates:
            return self
        new, old = self.block, previous.to(self.block.values.device).block
        a, b = _overlap(new.basis_a, old.basis_a), _overlap(new.basis_b, old.basis_b)
        values = b @ old.values.to(b.dtype) @ a.mT
        return replace(self, block=replace(new, values=values), updates=previous.updates)

    def corrected(self, squares: Tensor, decay: float) -> CorrectedInverse:
        """See `LayerInverse`."""
        updates = self.updates + 1
        weight = (1 - decay) / (1 - decay**updates)
        values = self.block.values.to(squares).lerp(squares, weight)
        return replace(self, block=replace(self.block, values=values), updates=updates)


def _overlap(new: Tensor | None, old: Tensor | None) -> Tensor:
    """Return the squared inner products of two bases, ``[g, d, d]``."""
    assert new is not None
    assert old is not None
    return product(new.mT, old.to(new.dtype)).square_()


def inverse_of(state: dict[str, Any], layout: Layout, device: torch.device) -> LayerInverse:
    """Return the inverse that a state describes, with tensors of its own.

    Args:
        state: What `LayerInverse.state_dict` returned.
        layout: The layer's parameters.
        device: Where to.
    """
    own: dict[str, Any] = {
        name: value.to(device, copy=True) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    if "basis_a" not in own:
        return FactoredInverse(**own)
    block = EigenBlock(own.pop("basis_a"), own.pop("basis_b"), own.pop("values"), layout)
    return CorrectedInverse(block, **own) if "updates" in own else EigenInverse(block, **own)

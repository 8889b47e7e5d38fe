"""``inverse="ekfac"``: as ``"exact"``, with averages of squared gradients as eigenvalues."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.optim.inverses.eigen import (
    EigenInverse,
    eigen_schema,
    invert_by_eigh,
    load_eigen,
)
from einconv_kfac.optim.inverses.protocol import Kind, LayerInverse
from einconv_kfac.optim.moving_average import bias_corrected_weight
from einconv_kfac.optim.state_schema import COUNT


@dataclass(frozen=True, eq=False)
class EKFACInverse(EigenInverse):
    """An inverse whose eigenvalues are second moments of gradients (George et al., 2018).

    They are bias-corrected exponential moving averages of squared per-example gradients in the
    eigenbasis of ``B (x) A``. Before the first update they are the eigenvalues of ``B (x) A``.

    Args:
        updates: Number of updates of the averages.
    """

    kind = "ekfac"
    updates: int = 0

    @property
    def eigenbasis(self) -> EigenBlock:
        """See `LayerInverse`."""
        return self.block

    def with_statistics_of(self, previous: LayerInverse | None) -> EKFACInverse:
        """Return the inverse with the averages of the previous one, projected to its eigenbasis.

        The curvature ``V diag(s) V^T`` of the previous inverse keeps its trace, but of its
        entries in the new basis only the diagonal, see `EigenBlock.diagonal_in`.
        """
        if not isinstance(previous, EKFACInverse) or not previous.updates:
            return self
        values = previous.to(self.block.values.device).block.diagonal_in(self.block)
        return replace(self, block=replace(self.block, values=values), updates=previous.updates)

    def with_squared_gradients(self, squares: Tensor, decay: float) -> EKFACInverse:
        """See `LayerInverse`."""
        updates = self.updates + 1
        weight = bias_corrected_weight(decay, updates)
        values = self.block.values.to(squares).lerp(squares, weight)
        return replace(self, block=replace(self.block, values=values), updates=updates)

    def state_dict(self) -> dict[str, Any]:
        """See `LayerInverse`."""
        return {**super().state_dict(), "updates": self.updates}


KIND = Kind(
    EKFACInverse.kind,
    partial(invert_by_eigh, EKFACInverse),
    partial(load_eigen, EKFACInverse),
    damping_needs_decomposition=False,
    needs_per_example_gradients=True,
    schema=partial(eigen_schema, EKFACInverse.kind, updates=COUNT),
)

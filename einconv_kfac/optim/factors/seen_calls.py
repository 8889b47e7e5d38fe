"""Calls of layers that were seen before, and what is found out from others."""

from __future__ import annotations

from collections.abc import Callable, Hashable

from torch import Tensor

from einconv_kfac.curvature.devices.late_numbers import LateNumbers
from einconv_kfac.curvature.estimation.arrangement import Layouts


class SeenCalls:
    """The kind of the last calls; what others show counts only if their loss is finite.

    Args:
        layouts: The layouts that calls were found to have, which are added to.
    """

    def __init__(self, layouts: Layouts) -> None:
        self._layouts = layouts
        self._kind: Hashable = ()

    def add_(
        self,
        kind: Hashable,
        loss: Tensor,
        add: Callable[[], None],
        forget: Callable[[], None],
    ) -> None:
        """Add a batch, unless its calls are new and its loss is not finite.

        On a GPU it is added first, and forgotten once the host has read that the loss is not
        finite: a step with such a loss is skipped anyway.

        Args:
            kind: The kind of its calls.
            loss: Its loss.
            add: Adds it.
            forget: Drops what was added in this step.
        """
        if kind == self._kind:
            add()
            return
        is_finite = loss.isfinite().all().reshape(1)
        late = LateNumbers(is_finite) if is_finite.is_cuda else None
        if late is None and not bool(is_finite):
            return
        known = dict(self._layouts)
        try:
            add()
        except (RuntimeError, ValueError):
            if late is None or late.read()[0]:
                raise
        if late is None or late.read()[0]:
            self._kind = kind
            return
        self._layouts.clear()
        self._layouts.update(known)
        forget()

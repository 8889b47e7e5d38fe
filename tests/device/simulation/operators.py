"""What the simulation asks of an operator again and again, found out once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from record import HOST_READS, NO_LAUNCH
from torch.utils.flop_counter import flop_registry

PRODUCTS = {"mm": 0, "bmm": 0} | dict.fromkeys(
    ("addmm_", "baddbmm_", "addbmm_", "addmm", "baddbmm"), 1
)
"""Products of two matrices, with the position of the first; torch counts some of them slowly."""
OPERATORS: dict[Any, Operator] = {}
"""The operators that have run."""


@dataclass(frozen=True)
class Operator:
    """An operator.

    Args:
        name: Without its overload.
        is_view: Whether its result views its first argument.
        is_mutable: Whether it changes an argument.
        changes_view: Whether it changes the shape of its first argument in place.
        launches: Whether it has a kernel.
        reads: Whether the device, or the host for a number, reads its arguments.
        count: Counts floating point operations, if torch does.
    """

    name: str
    is_view: bool
    is_mutable: bool
    changes_view: bool
    launches: bool
    reads: bool
    count: Callable[..., int] | None

    @staticmethod
    def of(func: Any) -> Operator:
        """Return the description of one of torch's operators."""
        name = func.overloadpacket.__name__
        return Operator(
            name,
            func.is_view,
            func._schema.is_mutable,
            torch.Tag.inplace_view in func.tags,
            not (name in NO_LAUNCH or func.is_view),
            name not in NO_LAUNCH - HOST_READS,
            flop_registry.get(func.overloadpacket),
        )

    def operations(self, args: Any, kwargs: Any, result: Any) -> int:
        """Return the floating point operations of a matrix product, 0 for other operators."""
        first = PRODUCTS.get(self.name)
        if first is not None:
            return 2 * args[first].numel() * args[first + 1].shape[-1]
        return 0 if self.count is None else int(self.count(*args, **kwargs, out_val=result))

"""Changes of parameters in place, many at once, that their versions tell of.

Inside of a mode of torch that sees each operation, as `torch.utils.flop_counter.FlopCounterMode`,
torch's own functions for lists of tensors leave the versions of the tensors alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version


def add_(parameters: Sequence[Tensor], others: Sequence[Tensor], alpha: float = 1.0) -> None:
    """Add multiples of other tensors to parameters."""
    torch._foreach_add_([*parameters], [*others], alpha=alpha)
    _count_(parameters)


def copy_(parameters: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    """Give parameters the values of other tensors."""
    torch._foreach_copy_([*parameters], [*others])
    _count_(parameters)


def scale_(parameters: Sequence[Tensor], factors: Sequence[float]) -> None:
    """Multiply parameters by numbers."""
    torch._foreach_mul_([*parameters], [*factors])
    _count_(parameters)


def _count_(parameters: Iterable[Tensor]) -> None:
    """Count up the versions of parameters where torch has not."""
    if torch._C._len_torch_dispatch_stack():
        for parameter in parameters:
            increment_version(parameter)

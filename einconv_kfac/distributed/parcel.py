"""Nested containers of tensors and numbers, as buffers that one worker sends to all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree

from einconv_kfac.distributed.triangles import Packing, Symmetric


@dataclass(frozen=True)
class Slot:
    """Where a tensor belongs in a container.

    Args:
        index: Its index among the tensors of the container.
        shape: Its shape.
        dtype: Its data type.
        is_symmetric: Whether it consists of symmetric matrices, of which triangles are sent.
    """

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_symmetric: bool

    def empty(self, device: torch.device) -> Tensor | Symmetric:
        """Return what receives the tensor."""
        tensor = torch.zeros(self.shape, dtype=self.dtype, device=device)
        return Symmetric(tensor) if self.is_symmetric else tensor


def emptied(value: Any) -> tuple[Any, list[Tensor | Symmetric]]:
    """Return containers with slots in place of tensors, and the tensors."""
    tensors: list[Tensor | Symmetric] = []

    def slot(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        is_symmetric = _is_symmetric(leaf)
        tensors.append(Symmetric(leaf) if is_symmetric else leaf)
        return Slot(len(tensors) - 1, tuple(leaf.shape), leaf.dtype, is_symmetric)

    return _pytree.tree_map(slot, value), tensors


def packing_of(containers: Any, device: torch.device) -> Packing:
    """Return the packing that receives the tensors of emptied containers."""
    slots = [leaf for leaf in _pytree.tree_leaves(containers) if isinstance(leaf, Slot)]
    return Packing([slot.empty(device) for slot in slots])


def filled(containers: Any, tensors: Sequence[Tensor]) -> Any:
    """Return emptied containers with tensors in their slots."""

    def tensor(leaf: Any) -> Any:
        return tensors[leaf.index] if isinstance(leaf, Slot) else leaf

    return _pytree.tree_map(tensor, containers)


def _is_symmetric(tensor: Tensor) -> bool:
    """Return whether a tensor consists of symmetric matrices, to the bit."""
    is_square = tensor.ndim == 3 and tensor.shape[1] == tensor.shape[2]
    return is_square and torch.equal(tensor, tensor.mT)

"""The constant that a tensor is a parameter's multiple of, entry by entry, read off its graph."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.torch_versions import packs_saved_tensors

_SAME = ("ToCopyBackward0", "CloneBackward0", "AliasBackward0")
"""Operations that return their argument in another data type or memory."""


@dataclass(frozen=True)
class ConstantFactor:
    """The constants that a parameter was multiplied by.

    Args:
        parts: The constants.
        is_known: Whether they were read. Inside of checkpoints that would compute them again.
    """

    parts: tuple[Tensor, ...]
    is_known: bool = True

    def value(self) -> Tensor | None:
        """Return the product, or ``None`` for 1."""
        if not self.parts:
            return None
        result = self.parts[0]
        for part in self.parts[1:]:
            result = result * part
        return result


def constant_factor(tensor: Tensor, parameter: Tensor) -> ConstantFactor | None:
    """Return the constants that a tensor is the product of a parameter with.

    Args:
        tensor: The tensor, with its graph.
        parameter: The parameter, a leaf of the graph.

    Returns:
        ``None`` if the tensor is something else.
    """
    if tensor is parameter:
        return ConstantFactor(())
    if tensor.shape != parameter.shape or tensor.grad_fn is None:
        return None
    if packs_saved_tensors():
        return ConstantFactor((), is_known=False) if _leads_to(tensor, parameter) else None
    return ConstantFactor(tuple(_constants(tensor))) if _leads_to(tensor, parameter) else None


def _chain(tensor: Tensor) -> Iterator[tuple[Any, int]]:
    """Yield the nodes from a tensor on, and which argument depends on parameters, the leaf last.

    It ends early at an operation that is no multiplication by a constant.
    """
    node: Any = tensor.grad_fn
    while node is not None:
        following = [other for other, _ in node.next_functions]
        used = [index for index, other in enumerate(following) if other is not None]
        yield node, used[0] if used else 0
        kind = node.name()
        if kind not in ("MulBackward0", "DivBackward0", *_SAME) or len(used) != 1:
            return
        node = None if kind == "DivBackward0" and used[0] else following[used[0]]


def _leads_to(tensor: Tensor, parameter: Tensor) -> bool:
    """Return whether a tensor is a parameter times constants."""
    node, _ = list(_chain(tensor))[-1]
    return getattr(node, "variable", None) is parameter


def _constants(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the constants, those that were divided by as their inverses."""
    for node, index in _chain(tensor):
        kind = node.name()
        if kind == "MulBackward0":
            yield _own(node._saved_self if index else node._saved_other)
        elif kind == "DivBackward0":
            yield torch.reciprocal(_own(node._saved_other))


def _own(saved: Tensor) -> Tensor:
    """Return a saved tensor; numbers of Python do not take part in the choice of data types."""
    found = saved.detach()
    return found.clone() if found.ndim == 0 and found.is_cpu else found

"""A network and the tensors of a caller, as an equation and operands of ``torch.einsum``."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.expressions.pattern import pattern_tensor
from einconv_kfac.network.cache import CacheInfo, register
from einconv_kfac.network.operand import PATTERN_ROLES, Delta, Operand, Pattern
from einconv_kfac.network.step import Drop, Fold, Insert, Merge, Narrow, Pad, Split, Step, Windows
from einconv_kfac.padding import padded


def _padded(tensor: Tensor, step: Pad) -> Tensor:
    """Add zeros to both ends of one dimension, or remove positions."""
    behind = [(0, 0)] * (tensor.ndim - 1 - step.dim)
    return padded(tensor, [(step.left, step.right), *behind])


def _windowed(tensor: Tensor, step: Windows) -> Tensor:
    """View one dimension as windows."""
    windows = tensor.unfold(step.dim, step.span, step.stride)[..., :: step.dilation]
    return windows.movedim(-1, step.dim + 1)


def _folded(tensor: Tensor, step: Fold) -> Tensor:
    """Add windows up where they overlap."""
    count, size = tensor.shape[step.dim : step.dim + 2]
    folded = tensor.new_zeros(step.reshape(tensor.shape))
    for entry in range(size):
        start = entry * step.dilation
        places = range(start, start + (count - 1) * step.stride + 1)
        target = folded.narrow(step.dim, places.start, len(places))
        target[_every(step.dim, step.stride)].add_(tensor.select(step.dim + 1, entry))
    return folded


def _every(dim: int, stride: int) -> tuple[slice, ...]:
    """Index that keeps every ``stride``-th position of a dimension."""
    return (slice(None),) * dim + (slice(None, None, stride),)


_ACTIONS: dict[type, Callable[[Tensor, Any], Tensor]] = {
    Split: lambda t, s: torch.unflatten(t, s.dim, s.sizes),
    Merge: lambda t, s: t.flatten(s.dim, s.dim + s.count - 1),
    Drop: lambda t, s: t.squeeze(s.dim),
    Insert: lambda t, s: t.unsqueeze(s.dim),
    Narrow: lambda t, s: t.narrow(s.dim, s.start, s.length),
    Pad: _padded,
    Windows: _windowed,
    Fold: _folded,
}


def stepped(tensor: Tensor, steps: Iterable[Step]) -> Tensor:
    """Take a tensor through the steps."""
    for step in steps:
        tensor = _ACTIONS[type(step)](tensor, step)
    return tensor


class ConstantCache:
    """Tensors of patterns and deltas, per operand, device and type; bounded and thread-safe.

    Only ordinary tensors are stored: none of a trace, of fake mode, of inference mode or on
    the meta device.
    """

    def __init__(self, maxsize: int) -> None:
        """Start empty, with room for ``maxsize`` tensors."""
        self._maxsize = maxsize
        self._lock = Lock()
        self._hits = self._misses = 0
        self._tensors: OrderedDict[tuple[Operand, torch.device, torch.dtype], Tensor] = (
            OrderedDict()
        )

    def __call__(self, operand: Operand, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the tensor, from the cache if it may be."""
        if _transformed():
            return constant_tensor(operand, device, dtype)
        key = (operand, device, dtype)
        with self._lock:
            tensor = self._tensors.get(key)
            if tensor is not None:
                self._hits += 1
                self._tensors.move_to_end(key)
                return tensor
        tensor = constant_tensor(operand, device, dtype)
        if _ordinary(tensor):
            with self._lock:
                self._misses += 1
                self._tensors[key] = tensor
                while len(self._tensors) > self._maxsize:
                    self._tensors.popitem(last=False)
        return tensor

    def cache_info(self) -> CacheInfo:
        """Return the statistics, as ``functools.lru_cache`` does."""
        return CacheInfo(self._hits, self._misses, self._maxsize, len(self._tensors))

    def cache_clear(self) -> None:
        """Forget all tensors and the statistics."""
        with self._lock:
            self._tensors.clear()
            self._hits = self._misses = 0


constant = ConstantCache(maxsize=256)
register("expressions.constant", constant)


def constant_tensor(operand: Operand, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the tensor of a pattern, of a sum of one, or of a delta."""
    if isinstance(operand, Delta):
        return torch.eye(operand.size, device=device, dtype=dtype)
    assert isinstance(operand, Pattern)  # leaves are the caller's
    pattern = pattern_tensor(operand.axis, device, torch.bool)
    summed = [PATTERN_ROLES.index(role) for role in operand.summed]
    return (pattern.sum(summed) if summed else pattern).to(dtype)


def _transformed() -> bool:
    """Whether a mode that produces other than ordinary tensors is active."""
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _ordinary(tensor: Tensor) -> bool:
    """Whether a tensor may outlive the call."""
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


def scalar(value: float, like: Tensor) -> Tensor:
    """Return a number as a tensor of no dimension, of the type and on the device of another."""
    return torch.full((), value, device=like.device, dtype=like.dtype)

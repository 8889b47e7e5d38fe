"""The tensors of index patterns, Kronecker deltas and numbers, with a cache."""

from __future__ import annotations

from collections import OrderedDict
from fractions import Fraction
from threading import Lock

import torch
from torch import Tensor

from einconv_kfac.expressions.pattern import pattern_tensor
from einconv_kfac.network.cache import CacheInfo, register
from einconv_kfac.network.operand import PATTERN_ROLES, Delta, Operand, Pattern


class ConstantCache:
    """Tensors of patterns and deltas by operand, device and type; bounded and thread-safe.

    Only ordinary tensors are cached, not those of a trace, of fake mode, of inference mode or on
    the meta device.

    Args:
        maxsize: Largest number of tensors.
    """

    def __init__(self, maxsize: int) -> None:
        """Start with an empty cache."""
        self._maxsize = maxsize
        self._lock = Lock()
        self._hits = self._misses = 0
        self._tensors: OrderedDict[tuple[Operand, torch.device, torch.dtype], Tensor] = (
            OrderedDict()
        )

    def __call__(self, operand: Operand, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the tensor of an operand, from the cache if no mode forbids it."""
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
        """Remove all tensors and reset the statistics."""
        with self._lock:
            self._tensors.clear()
            self._hits = self._misses = 0


constant = ConstantCache(maxsize=256)
register("expressions.constant", constant)


def constant_tensor(operand: Operand, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the tensor of a pattern, of a summed pattern, or of a delta."""
    if isinstance(operand, Delta):
        return torch.eye(operand.size, device=device, dtype=dtype)
    assert isinstance(operand, Pattern)  # leaves are the caller's
    pattern = pattern_tensor(operand.axis, device, torch.bool)
    summed = [PATTERN_ROLES.index(role) for role in operand.summed]
    return (pattern.sum(summed) if summed else pattern).to(dtype)


def _transformed() -> bool:
    """Return whether a mode is active under which new tensors are not ordinary."""
    return (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or torch._C._len_torch_dispatch_stack() > 0
    )


def _ordinary(tensor: Tensor) -> bool:
    """Return whether a tensor may be used outside of the current mode."""
    return type(tensor) is Tensor and not tensor.is_meta and not tensor.is_inference()


def scalar(value: Fraction, like: Tensor) -> Tensor:
    """Return a number as a tensor without dimensions, with another's type and device.

    Raises:
        ValueError: If the type has no fractions, and the number is one.
    """
    check_factor(value, like)
    return torch.full((), float(value), device=like.device, dtype=like.dtype)


def check_factor(value: Fraction, tensor: Tensor) -> None:
    """Raise a ``ValueError`` if a fraction is the factor of a tensor of integers."""
    if value.denominator != 1 and not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(
            "`x` must be of floating-point or complex numbers where the result has the factor "
            f"{value}, got {tensor.dtype}. Pass x.double()."
        )

"""Choices that the device makes: values or others, by a flag that the host has not read.

Bits are multiplied by 0 or 1, as integers: a number that is not finite, times zero, is none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integers with a number of bytes."""


def or_zero(tensors: Sequence[Tensor], flag: Tensor) -> list[Tensor]:
    """Return copies of tensors where a flag is set, and zeros where not."""

    def chosen(bits: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
        return torch._foreach_mul(bits, factor)

    return _by_type(chosen, flag, tensors)


def or_others(tensors: Sequence[Tensor], others: Sequence[Tensor], flag: Tensor) -> list[Tensor]:
    """Return copies of tensors where a flag is set, and of others of their form where not."""

    def chosen(bits: list[Tensor], factor: Tensor, given: list[Tensor]) -> Sequence[Tensor]:
        found = torch._foreach_mul(bits, factor)
        torch._foreach_add_(found, torch._foreach_mul(given, 1 - factor))
        return found

    return _by_type(chosen, flag, tensors, others)


def _by_type(
    chosen: Callable[..., Sequence[Tensor]], flag: Tensor, *columns: Sequence[Tensor]
) -> list[Tensor]:
    """Apply a function to the bits of tensors of one data type at a time.

    Args:
        chosen: Takes bits of the first column, the flag as an integer, and bits of the others.
        flag: The flag.
        columns: Tensors; those of a row have the same form.
    """
    result: dict[int, Tensor] = {}
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(columns[0]):
        alike[_bits(tensor).dtype].append(index)
    for dtype, indices in alike.items():
        factor = flag.to(dtype)
        first, *others = ([_bits(column[index]) for index in indices] for column in columns)
        for index, bits in zip(indices, chosen(first, factor, *others)):
            result[index] = _from_bits(bits, columns[0][index].dtype)
    return [result[index] for index in range(len(columns[0]))]


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(_INTEGERS[tensor.element_size()])


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor that bits are of."""
    if dtype.is_complex:
        return torch.view_as_complex(bits.view(dtype.to_real()))
    return bits.view(dtype)

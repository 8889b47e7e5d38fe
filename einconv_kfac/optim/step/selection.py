"""Choices that the device makes: values or others, by a flag that the host has not read.

Bits are multiplied by 0 or 1, as integers: a number that is not finite, times zero, is none.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from einconv_kfac.optim.factors.finiteness import Finiteness
from einconv_kfac.optim.replay.versions import INTEGERS


def or_zero(tensors: Sequence[Tensor], finite: Finiteness) -> list[Tensor]:
    """Return copies of tensors if all is finite, and zeros if not."""

    def chosen(bits: list[Tensor], factor: Tensor) -> Sequence[Tensor]:
        return torch._foreach_mul(bits, factor)

    return _by_type(chosen, finite, tensors)


def or_others(
    tensors: Sequence[Tensor], others: Sequence[Tensor], finite: Finiteness
) -> list[Tensor]:
    """Return copies of tensors if all is finite, and of others of their form if not."""

    def chosen(bits: list[Tensor], factor: Tensor, given: list[Tensor]) -> Sequence[Tensor]:
        found = torch._foreach_sub(bits, given)  # which wraps around, and so does the sum
        torch._foreach_mul_(found, factor)
        torch._foreach_add_(found, given)
        return found

    return _by_type(chosen, finite, tensors, others)


def _by_type(
    chosen: Callable[..., Sequence[Tensor]], finite: Finiteness, *columns: Sequence[Tensor]
) -> list[Tensor]:
    """Apply a function to the bits of tensors of one data type at a time.

    Args:
        chosen: Takes bits of the first column, the flag as an integer, and bits of the others.
        finite: Whether all is finite, as the device knows.
        columns: Tensors; those of a row have the same form.
    """
    result: dict[int, Tensor] = {}
    alike: dict[torch.dtype, list[int]] = defaultdict(list)
    for index, tensor in enumerate(columns[0]):
        alike[_bits(tensor).dtype].append(index)
    for dtype, indices in alike.items():
        factor = finite.flag_as(dtype)
        first, *others = ([_bits(column[index]) for index in indices] for column in columns)
        for index, bits in zip(indices, chosen(first, factor, *others)):
            result[index] = _from_bits(bits, columns[0][index].dtype)
    return [result[index] for index in range(len(columns[0]))]


def _bits(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.view(INTEGERS[tensor.element_size()])


def _from_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor that bits are of."""
    if dtype.is_complex:
        return torch.view_as_complex(bits.view(dtype.to_real()))
    return bits.view(dtype)

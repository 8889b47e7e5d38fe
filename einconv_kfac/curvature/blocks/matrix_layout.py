"""How a layer's weight and bias form one matrix per channel group."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Parameters as matrices ``[g, co, d]``; a bias is the last column.

    The weight is reshaped to ``split``, its dimensions are permuted by ``order`` to
    ``[g, co, *d]``, and the last ones are flattened.

    Args:
        weight: Name of the weight.
        bias: Name of the bias, or ``None``.
        weight_shape: The weight's shape.
        split: Its shape after splitting dimensions.
        order: The permutation of ``split``.
        bias_shape: The bias' shape; it flattens to ``[(g co)]``.
    """

    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    bias_shape: tuple[int, ...] = ()

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape ``[g, co, d]`` of the matrices, bias column included."""
        g, co, *d = (self.split[dim] for dim in self.order)
        return g, co, prod(d) + (self.bias is not None)

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors by parameter name, ``[*v, *shape]``, as ``[*v, g, co, d]``.

        Raises:
            ValueError: If a tensor has another shape.
        """
        weight = self._checked(tensors, self.weight, self.weight_shape)
        free = weight.shape[: weight.ndim - len(self.weight_shape)]
        order = [*range(len(free)), *(len(free) + dim for dim in self.order)]
        rows = weight.reshape(*free, *self.split).permute(order).flatten(len(free) + 2)
        if self.bias is None:
            return rows
        bias = self._checked(tensors, self.bias, self.bias_shape)
        return torch.cat([rows, bias.reshape(*rows.shape[:-1], 1)], dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return matrices ``[*v, g, co, d]`` as tensors by parameter name."""
        free = matrix.shape[:-3]
        rows = matrix if self.bias is None else matrix[..., :-1]
        permuted = rows.reshape(*free, *(self.split[dim] for dim in self.order))
        back = sorted(range(len(self.order)), key=self.order.__getitem__)
        order = [*range(len(free)), *(len(free) + dim for dim in back)]
        result = {self.weight: permuted.permute(order).reshape(*free, *self.weight_shape)}
        if self.bias is not None:
            result[self.bias] = matrix[..., -1].reshape(*free, *self.bias_shape)
        return result

    def _checked(self, tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
        """Return the tensor of a parameter, whose trailing dimensions must be its shape."""
        if name not in tensors:
            raise ValueError(f"The vector must have an entry for '{name}', has {list(tensors)}.")
        tensor = tensors[name]
        if tensor.shape[tensor.ndim - len(shape) :] != shape:
            raise ValueError(
                f"The vector's entry '{name}' must have shape [*v, *{list(shape)}], got "
                f"{list(tensor.shape)}."
            )
        return tensor

"""How a layer's weight and bias form one matrix per channel group."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import prod
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import shown, sizes


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

    Attributes:
        parameters: The names of the weight and, if there is one, the bias.
        shape: The shape ``[g, co, d]`` of the matrices, bias column included.

    Raises:
        ValueError: If the names are none, or the shapes do not fit one another.

    >>> layout = Layout("weight", None, (2, 3), (1, 2, 3), (0, 2, 1))
    >>> layout.to_matrix({"weight": torch.tensor([[1, 2, 3], [4, 5, 6]])})
    tensor([[[1, 4],
             [2, 5],
             [3, 6]]])
    """

    weight: str
    bias: str | None
    weight_shape: tuple[int, ...]
    split: tuple[int, ...]
    order: tuple[int, ...]
    bias_shape: tuple[int, ...] = ()
    parameters: tuple[str, ...] = field(init=False, repr=False, compare=False)
    shape: tuple[int, int, int] = field(init=False, repr=False, compare=False)
    _is_in_order: bool = field(init=False, repr=False, compare=False)
    _rows: tuple[int, int, int] = field(init=False, repr=False, compare=False)
    _permuted: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _order_from_end: tuple[int, ...] = field(init=False, repr=False, compare=False)
    _inverse_from_end: tuple[int, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._check_()
        count = len(self.order)
        inverse = sorted(range(count), key=self.order.__getitem__)
        permuted = tuple(self.split[dim] for dim in self.order)
        g, co, *d = permuted
        derived = {
            "parameters": (self.weight,) if self.bias is None else (self.weight, self.bias),
            "shape": (g, co, prod(d) + (self.bias is not None)),
            "_is_in_order": self.order == tuple(range(count)),
            "_rows": (g, co, prod(d)),
            "_permuted": permuted,
            # counted from the last dimension, so that leading dimensions do not shift them
            "_order_from_end": tuple(dim - count for dim in self.order),
            "_inverse_from_end": tuple(dim - count for dim in inverse),
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)

    def _check_(self) -> None:
        """Raise a ``ValueError`` if names and shapes describe no layout; lists become tuples."""
        for name, value in (("weight", self.weight), ("bias", self.bias)):
            if not isinstance(value, str) and not (name == "bias" and value is None):
                raise ValueError(f"`{name}` must be a parameter's name, got {shown(value)}.")
        for name in ("weight_shape", "split", "order", "bias_shape"):
            object.__setattr__(self, name, sizes(name, getattr(self, name)))
        if prod(self.split) != prod(self.weight_shape):
            raise ValueError(
                f"`split` must have the {prod(self.weight_shape)} entries of `weight_shape` "
                f"{self.weight_shape}, got {self.split}."
            )
        if sorted(self.order) != list(range(len(self.split))) or len(self.order) < 2:
            raise ValueError(
                f"`order` must be a permutation of the {len(self.split)} dimensions of `split`, at "
                f"least two, got {self.order}."
            )
        rows = prod(self.split[dim] for dim in self.order[:2])
        if self.bias is not None and prod(self.bias_shape) != rows:
            raise ValueError(
                f"`bias_shape` must have {rows} entries, one per row of the matrices, got "
                f"{self.bias_shape}."
            )

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors by parameter name, ``[*v, *shape]``, as ``[*v, g, co, d]``.

        Raises:
            ValueError: If a parameter is missing, or its tensor has another shape.
        """
        rows, column = self._columns(tensors)
        return rows if column is None else torch.cat([rows, column], dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return matrices ``[*v, g, co, d]`` as tensors ``[*v, *shape]`` by parameter name."""
        if self.bias is None:
            return self._tensors(matrix, None)
        last = matrix.shape[-1] - 1
        return self._tensors(matrix.narrow(-1, 0, last), matrix.select(-1, last))

    def is_transpose_of(self, other: Layout) -> bool:
        """Return whether the matrices are the transposes of another layout's, of one weight.

        >>> linear = Layout("weight", None, (2, 3), (1, 2, 3), (0, 1, 2))
        >>> linear.is_transpose_of(Layout("weight", None, (2, 3), (1, 2, 3), (0, 2, 1)))
        True
        """
        if self.weight != other.weight or self.split != other.split or self.bias or other.bias:
            return False
        g, rows, columns, *rest = self.order
        sizes = [self.split[dim] for dim in rest]
        return other.order == (g, columns, rows, *rest) and all(size == 1 for size in sizes)

    def without_bias(self) -> Layout:
        """Return the layout of the weight alone."""
        return Layout(self.weight, None, self.weight_shape, self.split, self.order)

    def state_dict(self) -> dict[str, Any]:
        """Return the arguments by name: strings, numbers and tuples."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}

    def _columns(self, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """Return the weight as ``[*v, g, co, d]`` and the bias as ``[*v, g, co, 1]``."""
        weight = self._checked(tensors, self.weight, self.weight_shape)
        free = weight.shape[: weight.ndim - len(self.weight_shape)]
        if self._is_in_order:
            rows = weight.reshape(*free, *self._rows)
        else:
            split = weight.reshape(*free, *self.split)
            rows = split.permute(*range(len(free)), *self._order_from_end).flatten(len(free) + 2)
        if self.bias is None:
            return rows, None
        bias = self._checked(tensors, self.bias, self.bias_shape)
        return rows, bias.reshape(*rows.shape[:-1], 1)

    def _tensors(self, rows: Tensor, column: Tensor | None) -> dict[str, Tensor]:
        """Return the tensors of a weight ``[*v, g, co, d]`` and a bias ``[*v, g, co]``."""
        free = rows.shape[:-3]
        if not self._is_in_order:
            rows = rows.reshape(*free, *self._permuted)
            rows = rows.permute(*range(len(free)), *self._inverse_from_end)
        result = {self.weight: rows.reshape(*free, *self.weight_shape)}
        if self.bias is not None and column is not None:
            result[self.bias] = column.reshape(*free, *self.bias_shape)
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


def mapped_matrices(
    layout: Layout, tensors: Mapping[str, Tensor], function: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return what a function makes of the matrices of tensors, as tensors by parameter name."""
    return layout.from_matrix(function(layout.to_matrix(tensors)))


def joined_matrices(layouts: Sequence[Layout], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the matrices of several layouts ``[g, co, d]`` that differ in ``g`` alone, as one.

    All have a bias, or none has.
    """
    parts = [layout._columns(tensors) for layout in layouts]
    rows = torch.cat([weight for weight, _ in parts])
    columns = [column for _, column in parts if column is not None]
    return torch.cat([rows, torch.cat(columns)], dim=-1) if columns else rows


def divided_matrices(layouts: Sequence[Layout], matrices: Tensor) -> dict[str, Tensor]:
    """Return tensors by parameter name, of matrices as `joined_matrices` returns them."""
    rows, columns = matrices, matrices[..., -1]
    if layouts[0].bias is not None:
        rows, columns = matrices[..., :-1].contiguous(), columns.contiguous()
    sizes = [layout.shape[0] for layout in layouts]
    result: dict[str, Tensor] = {}
    parts = torch.split(rows, sizes), torch.split(columns, sizes)
    for layout, own, column in zip(layouts, *parts):
        result.update(layout._tensors(own, column))
    return result

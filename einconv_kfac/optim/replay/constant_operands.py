"""Sums, products and quotients with constants in forward mode.

Where one of two operands has a tangent, torch makes a zero tangent for the other one. It finds the
shape of the result by operations that are written in Python, which take a fraction of a
millisecond, however small the tensors. Here only the tangent that there is takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay.tangents import parts
from einconv_kfac.torch_versions import make_dual

Operand: TypeAlias = Tensor | float
Rule: TypeAlias = Callable[[Tensor, Any, Any], tuple[Tensor, Tensor]]
"""Returns value and tangent for a tangent and the two operands without it."""

_TENSORS = (Tensor, nn.Parameter)
_NUMBERS = (bool, int, float)


def _add(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left + right, tangent.clone()


def _subtract(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left - right, tangent.clone()


def _subtract_from(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left - right, -tangent


def _multiply(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left * right, tangent * right


def _multiply_by(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left * right, left * tangent


def _divide(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    return left / right, tangent / right


def _divide_by(tangent: Tensor, left: Any, right: Any) -> tuple[Tensor, Tensor]:
    value = left / right
    return value, -(value / right) * tangent


_ADD, _SUBTRACT, MULTIPLY, _DIVIDE = (
    (_add, _add),
    (_subtract, _subtract_from),
    (_multiply, _multiply_by),
    (_divide, _divide_by),
)
RULES: Mapping[Any, tuple[Rule, Rule]] = {
    torch.add: _ADD,
    Tensor.add: _ADD,
    torch.sub: _SUBTRACT,
    Tensor.sub: _SUBTRACT,
    torch.mul: MULTIPLY,
    Tensor.mul: MULTIPLY,
    torch.div: _DIVIDE,
    Tensor.div: _DIVIDE,
    Tensor.__rsub__: _SUBTRACT,
    Tensor.__rdiv__: _DIVIDE,
}
"""The rules by the functions that are called for operators, for a tangent of either operand."""
REVERSED = frozenset({Tensor.__rsub__, Tensor.__rdiv__})
"""Those of them whose operands are called the other way round."""


def joined(rules: tuple[Rule, Rule], left: Operand, right: Operand) -> Tensor | None:
    """Return the result of an operation of whose operands one has a tangent, else ``None``."""
    known = [_operand(each) for each in (left, right)]
    tangents = [each[1] for each in known if each is not None]
    if len(tangents) != 2 or (tangents[0] is None) == (tangents[1] is None):
        return None
    own = 0 if tangents[0] is not None else 1
    tangent, operands = tangents[own], [each[0] for each in known if each is not None]
    assert tangent is not None
    value, found = rules[own](tangent, *operands)
    if value.dtype != tangent.dtype:
        return None
    whole = found if found.shape == value.shape else found.expand_as(value).clone()
    return make_dual(value, whole)


def _operand(own: Operand) -> tuple[Operand, Tensor | None] | None:
    """Return the value and the tangent of an operand of a type that is known."""
    if type(own) in _NUMBERS:
        return own, None
    return parts(own) if isinstance(own, Tensor) and type(own) in _TENSORS else None

"""Simplification of an einsum equation and its operands."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from einconv_kfac.expressions.expression import Expression
from einconv_kfac.expressions.pattern import recognized_axis
from einconv_kfac.expressions.shapes import check_tensor
from einconv_kfac.network import Leaf, Network, Node, Pattern, simplified
from einconv_kfac.network.equation import parse_equation


def simplify(equation: str, operands: Sequence[Tensor]) -> tuple[str, list[Tensor]]:
    """Simplify an einsum expression; its result is the same up to a reshape.

    Operands that are index patterns (`index_pattern`) are recognized by their values, also as
    copies and casts.

    Args:
        equation: Equation of ``torch.einsum`` with an explicit output, as in ``"ij,jk->ik"``.
        operands: As many tensors as the equation has inputs.

    Returns:
        Simplified equation and operands.

    Raises:
        ValueError: If equation and operands do not match.
        TypeError: If the equation is no word, or an operand no tensor.

    >>> import torch
    >>> from einconv_kfac import index_pattern
    >>> pattern = index_pattern(8, 2, stride=2, dtype=torch.float32)
    >>> simplify("ni,koi->nko", [torch.rand(3, 8), pattern])[0]
    'abc->acb'
    """
    if not isinstance(equation, str):
        raise TypeError(f"`equation` must be a string, got {equation!r}.")
    if not isinstance(operands, (list, tuple)):
        raise TypeError(f"`operands` must be a list of tensors, got {operands!r}.")
    for number, operand in enumerate(operands):
        check_tensor(operand, f"operands[{number}]")
    inputs, output = parse_equation(equation)
    if len(inputs) != len(operands):
        raise ValueError(
            f"`operands` must be the {len(inputs)} tensors of {equation!r}, got {len(operands)}."
        )
    for number, (operand, indices) in enumerate(zip(operands, inputs)):
        if operand.ndim != len(indices):
            raise ValueError(
                f"`operands[{number}]` must have the {len(indices)} dimensions that "
                f"{equation!r} names, got shape {list(operand.shape)}."
            )
    nodes = tuple(map(_node, range(len(inputs)), operands, inputs))
    sizes = {index: size for node in nodes for index, size in zip(node.indices, node.operand.shape)}
    shape = tuple(sizes.get(index, 0) for index in output)  # `Network` refuses unknown indices
    network = Network(nodes, output, shape, reshape_only=True)
    equation, bound, _ = Expression(simplified(network)).bind(*operands)
    return equation, bound


def _node(slot: int, operand: Tensor, indices: tuple[str, ...]) -> Node:
    """Return the node of an operand: a pattern if its values are one, else a leaf."""
    axis = recognized_axis(operand) if len(set(indices)) == 3 else None
    if axis is not None:
        return Node(Pattern(axis), indices)
    return Node(Leaf(f"x{slot}", slot, tuple(operand.shape)), indices)

"""Results in another network, as a discriminator, that the next operation does not save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from einconv_kfac.curvature.objective.graph import (
    Edge,
    dependents,
    inputs_of,
    kind_of_node,
    leaf_of,
)
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes import normalisation
from einconv_kfac.curvature.objective.nodes.bilinear import AddedProduct
from einconv_kfac.curvature.objective.nodes.elementary import Rectifier
from einconv_kfac.curvature.objective.nodes.in_place import InPlace
from einconv_kfac.curvature.objective.nodes.linear_operations import LINEAR
from einconv_kfac.curvature.objective.nodes.normalisation import Normalisation
from einconv_kfac.curvature.objective.nodes.reductions import (
    Extremum,
    Selection,
    fixed_selection,
    is_selection,
)

# fmt: off
_WITH_CONSTANTS = frozenset(
    (
        "Add", "AddBroadcast", "Cat", "Complex", "ConstantPadNd", "Copy", "CopySlices", "Fmod",
        "Frac", "IndexAdd", "IndexFill", "IndexPut", "MaskedFill", "MaskedScatter", "Remainder",
        "Rsub", "Scatter", "ScatterAdd", "SliceScatter", "Stack", "Sub", "Where",
    )
)
# fmt: on
"""Linear operations to which constants may belong that their nodes do not save."""
_SUMS = ("Add", "Sub", "Cat", "Stack")
"""Those whose constants have an input of their own."""
_SCALES = ("Mul", "Div")
"""Operations that are linear where one factor is constant."""


def _none(_: object) -> None:
    """Return ``None``."""


class Known(NamedTuple):
    """What results follow from beside what nodes save.

    Args:
        output: Returns the recorded value of a model's output at an edge, or ``None``.
        shift_of: Returns the shift of a frozen layer by its weight, or ``None``.
        leaves_out_constants: Whether to leave out constants that are added, which are not in the
            graph, and shifts that are not known, in place of returning ``None``.
    """

    output: Callable[[Edge], Tensor | None] = _none
    shift_of: Callable[[Tensor | None], Tensor | None] = _none
    leaves_out_constants: bool = False


NOTHING = Known()
"""Nothing but what nodes save."""


def recorded_result(edge: Edge, known: Known = NOTHING) -> Tensor | None:
    """Return the result of an operation, computed again from what its node saves.

    Known are layers with weights, normalisations, sums, products and functions of entries. ``None``
    for others, and where there is a shift that is not in the graph, because its layer is frozen.

    Args:
        edge: The result in the graph.
        known: What is known beside the nodes.
    """
    with torch.no_grad():
        value = _of_node(edge, known)
        return _of_linear(edge, known) if value is None else value


def _of_node(edge: Edge, known: Known) -> Tensor | None:
    """Return a result that is an output of the model, or follows from what its own node saves."""
    (node, index), value = edge, known.output(edge)
    if value is None and (leaf := leaf_of(edge)) is not None:
        return leaf.detach()
    kind = kind_of_node(node)
    rule = NODE_RULES.get(kind)
    if value is not None or kind not in _BY_KIND or (rule is not None and rule.output != index):
        return value
    return _BY_KIND[kind](node, known)


def _of_function(node: Any, _: Known) -> Tensor | None:
    """Return the result of a function whose inputs the node saves."""
    rule = NODE_RULES[kind_of_node(node)]
    function, inputs = rule.function(node), rule.inputs(node)
    if function is None or any(each is None for each in inputs):
        return None
    return function(*inputs)


def _of_rectifier(node: Any, _: Known) -> Tensor | None:
    """Return the result of a positive part, which its node saves."""
    result: Tensor = node._saved_result.detach()
    return result


def _is_proportional(node: Node, known: Known) -> bool:
    """Return whether a result is linear in those that it depends on, without a constant."""
    kind, edges = kind_of_node(node), inputs_of(node)
    if kind in _SCALES:
        return sum(edge is not None for edge in edges) == 1
    if known.leaves_out_constants or (kind in _SUMS and None not in edges):
        return kind in LINEAR
    return kind in LINEAR - _WITH_CONSTANTS


def _of_linear(edge: Edge, known: Known) -> Tensor | None:
    """Return a result that is linear, without a constant, in results that are known."""
    given, seen, waiting = dict[Edge, Tensor](), {edge}, [edge]
    while waiting:
        node = waiting.pop()[0]
        if not _is_proportional(node, known):
            return None
        for own in {own for own in inputs_of(node) if own is not None} - seen:
            seen.add(own)
            if (value := _of_node(own, known)) is not None:
                given[own] = value
            else:
                waiting.append(own)
    nodes = dependents(edge, given.__contains__)
    return LinearMap(edge, nodes, given.__contains__)(given)


def _of_selection(node: Any, known: Known) -> Tensor | None:
    """Return entries at indices that the node saves; without these it saves what it selects of."""
    if not is_selection(node):
        return _of_function(node, known)
    before = _before(node, 0, known)
    return None if before is None else fixed_selection(node)(before)


def _of_largest(node: Any, _: Known) -> Tensor | None:
    """Return the largest entries of windows, at the indices that the node saves."""
    x, indices = node._saved_self.detach(), node._saved_result1
    found: Tensor = x.flatten(-2).gather(-1, indices.flatten(-2)).reshape(indices.shape)
    return found


def _before(node: Any, index: int, known: Known) -> Tensor | None:
    """Return the result that is an input of an operation."""
    edge = inputs_of(node)[index]
    return None if edge is None else recorded_result(edge, known)


def _of_linear_layer(node: Any, known: Known) -> Tensor | None:
    """Return the result of a linear layer."""
    mat1, mat2 = node._saved_mat1, node._saved_mat2
    if mat1 is None:  # where the weight is frozen
        mat1 = _before(node, 1, known)
    shift = _leaf(inputs_of(node)[0], known, mat2)
    if mat1 is None or mat2 is None:
        return None
    if shift is None:
        if not known.leaves_out_constants:
            return None
        shift = mat2.new_zeros(())
    return torch.addmm(shift, mat1, mat2, beta=node._saved_beta, alpha=node._saved_alpha)


def _of_convolution(node: Any, known: Known) -> Tensor | None:
    """Return the result of a convolution."""
    x, weight, has_shift = node._saved_input, node._saved_weight, node._saved_bias_sym_sizes_opt
    bias = _leaf(inputs_of(node)[2], known, weight) if any(has_shift or ()) else None
    is_shifted = bias is not None or not any(has_shift or ()) or known.leaves_out_constants
    if x is None or weight is None or not is_shifted:
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = [getattr(node, f"_saved_{name}") for name in names]
    result: Tensor = torch.ops.aten.convolution(x, weight, bias, *options)
    return result


def _of_normalisation(node: Any, known: Known) -> Tensor | None:
    """Return the result of a normalisation, ``[n, c, *]`` or with the normalised dimensions."""
    kind = kind_of_node(node)
    shift = _leaf(inputs_of(node)[2], known, node._saved_weight)
    function = NODE_RULES[kind].function(node)
    assert function is not None
    unshifted = function(node._saved_input)
    if shift is None:
        is_whole = node._saved_weight is None or known.leaves_out_constants
        return unshifted if is_whole else None
    if kind == "NativeLayerNorm":
        return unshifted + shift
    return unshifted + shift.reshape(-1, *[1] * (unshifted.ndim - 2))


def _leaf(edge: Edge | None, known: Known, weight: Tensor | None) -> Tensor | None:
    """Return the values of a shift, which may be repeated for several examples.

    Args:
        edge: Its edge; ``None`` if it is frozen.
        known: See `recorded_result`.
        weight: The weight of its layer.
    """
    if edge is None:
        return known.shift_of(weight)
    if kind_of_node(edge[0]) == "Repeat":
        own = _leaf(inputs_of(edge[0])[0], known, None)
        return None if own is None else own.repeat(edge[0]._saved_repeats)  # type: ignore[attr-defined]
    leaf = leaf_of(edge)
    return None if leaf is None else leaf.detach()


_SELECTING = (Extremum, Selection)
_WITHOUT_INPUTS = (Rectifier, InPlace, Normalisation, AddedProduct)
_FUNCTIONS = [r for r in NODE_RULES.values() if not isinstance(r, _WITHOUT_INPUTS)]
_BY_KIND: Mapping[str, Callable[[Any, Known], Tensor | None]] = {
    **dict.fromkeys((rule.kind for rule in _FUNCTIONS), _of_function),
    **dict.fromkeys((rule.kind for rule in normalisation.RULES), _of_normalisation),
    **dict.fromkeys((r.kind for r in _FUNCTIONS if isinstance(r, _SELECTING)), _of_selection),
    "Relu": _of_rectifier,
    "MaxPool2DWithIndices": _of_largest,
    "Convolution": _of_convolution,
    "Addmm": _of_linear_layer,
}

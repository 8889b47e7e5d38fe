"""Results in another network, as a discriminator, that the next operation does not save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from einconv_kfac.curvature.objective.graph import (
    Edge,
    inputs_of,
    kind_of_node,
    leaf_of,
    metadata_of,
)
from einconv_kfac.curvature.objective.node_registry import NODE_RULES
from einconv_kfac.curvature.objective.nodes import normalisation
from einconv_kfac.curvature.objective.nodes.bilinear import Product
from einconv_kfac.curvature.objective.nodes.elementary import Entrywise, Power, saved_options
from einconv_kfac.curvature.objective.nodes.reductions import Reduction

_VIEWS = {"View", "UnsafeView", "ReshapeAlias", "Squeeze", "Unsqueeze"}


def _none(_: object) -> None:
    """Return ``None``."""


class Known(NamedTuple):
    """What results follow from beside what nodes save.

    Args:
        output: Returns the recorded value of a model's output at an edge, or ``None``.
        shift_of: Returns the shift of a frozen layer by its weight, or ``None``.
    """

    output: Callable[[Edge], Tensor | None] = _none
    shift_of: Callable[[Tensor | None], Tensor | None] = _none


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
    kind, value = kind_of_node(edge[0]), known.output(edge)
    if value is not None:
        return value
    with torch.no_grad():
        if kind in _BY_KIND:
            return _BY_KIND[kind](edge[0], known)
        if kind in _VIEWS:
            before = _before(edge[0], 0, known)
            return None if before is None else before.reshape(metadata_of(edge).shape)
    return None


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


def _of_sum(node: Any, known: Known) -> Tensor | None:
    """Return the sum of two results."""
    first, second = _before(node, 0, known), _before(node, 1, known)
    if first is None or second is None:
        return None
    return torch.add(first, second, alpha=node._saved_alpha)


def _of_total(node: Any, known: Known) -> Tensor | None:
    """Return a sum or mean over dimensions."""
    before = _before(node, 0, known)
    function = torch.sum if kind_of_node(node) == "Sum" else torch.mean
    names = ("dim", "keepdim") if hasattr(node, "_saved_dim") else ()
    return None if before is None else function(before, **saved_options(node, names))


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
    if shift is None or mat1 is None or mat2 is None:
        return None
    return torch.addmm(shift, mat1, mat2, beta=node._saved_beta, alpha=node._saved_alpha)


def _of_convolution(node: Any, known: Known) -> Tensor | None:
    """Return the result of a convolution."""
    x, weight, has_shift = node._saved_input, node._saved_weight, node._saved_bias_sym_sizes_opt
    bias = _leaf(inputs_of(node)[2], known, weight) if any(has_shift or ()) else None
    if x is None or weight is None or (bias is None and any(has_shift or ())):
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
        return unshifted if node._saved_weight is None else None
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


_FUNCTIONS = [
    rule
    for rule in NODE_RULES.values()
    if isinstance(rule, (Entrywise, Power, Reduction)) or type(rule) is Product
]
_BY_KIND: Mapping[str, Callable[[Any, Known], Tensor | None]] = {
    **dict.fromkeys((rule.kind for rule in _FUNCTIONS), _of_function),
    **dict.fromkeys((rule.kind for rule in normalisation.RULES), _of_normalisation),
    "Relu": _of_rectifier,
    "Add": _of_sum,
    "Sum": _of_total,
    "Mean": _of_total,
    "MaxPool2DWithIndices": _of_largest,
    "Convolution": _of_convolution,
    "Addmm": _of_linear_layer,
}

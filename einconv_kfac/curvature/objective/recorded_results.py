"""Results in another network, as a discriminator, that the next operation does not save."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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

_VIEWS = {"View", "UnsafeView", "ReshapeAlias"}


def recorded_result(edge: Edge) -> Tensor | None:
    """Return the result of an operation, computed again from what its node saves.

    Known are layers with weights, normalisations, sums, products and functions of entries. ``None``
    for others, and where there is a shift that is not in the graph, because its layer is frozen.

    Args:
        edge: The result in the graph.
    """
    kind = kind_of_node(edge[0])
    with torch.no_grad():
        if kind in _BY_KIND:
            return _BY_KIND[kind](edge[0])
        if kind in _VIEWS:
            before = _before(edge[0], 0)
            return None if before is None else before.reshape(metadata_of(edge).shape)
    return None


def _of_function(node: Any) -> Tensor | None:
    """Return the result of a function whose inputs the node saves."""
    rule = NODE_RULES[kind_of_node(node)]
    function, inputs = rule.function(node), rule.inputs(node)
    if function is None or any(each is None for each in inputs):
        return None
    return function(*inputs)


def _of_rectifier(node: Any) -> Tensor | None:
    """Return the result of a positive part, which its node saves."""
    result: Tensor = node._saved_result.detach()
    return result


def _of_sum(node: Any) -> Tensor | None:
    """Return the sum of two results."""
    first, second = _before(node, 0), _before(node, 1)
    if first is None or second is None:
        return None
    return torch.add(first, second, alpha=node._saved_alpha)


def _of_total(node: Any) -> Tensor | None:
    """Return a sum or mean over dimensions."""
    before = _before(node, 0)
    function = torch.sum if kind_of_node(node) == "Sum" else torch.mean
    known = ("dim", "keepdim") if hasattr(node, "_saved_dim") else ()
    return None if before is None else function(before, **saved_options(node, known))


def _before(node: Any, index: int) -> Tensor | None:
    """Return the result that is an input of an operation."""
    edge = inputs_of(node)[index]
    return None if edge is None else recorded_result(edge)


def _of_linear_layer(node: Any) -> Tensor | None:
    """Return the result of a linear layer."""
    shift = _leaf(inputs_of(node)[0])
    mat1, mat2 = node._saved_mat1, node._saved_mat2
    if shift is None or mat1 is None or mat2 is None:
        return None
    return torch.addmm(shift, mat1, mat2, beta=node._saved_beta, alpha=node._saved_alpha)


def _of_convolution(node: Any) -> Tensor | None:
    """Return the result of a convolution."""
    bias = _leaf(inputs_of(node)[2])
    x, weight = node._saved_input, node._saved_weight
    if x is None or weight is None or (bias is None and any(node._saved_bias_sym_sizes_opt or ())):
        return None
    names = ("stride", "padding", "dilation", "transposed", "output_padding", "groups")
    options = [getattr(node, f"_saved_{name}") for name in names]
    result: Tensor = torch.ops.aten.convolution(x, weight, bias, *options)
    return result


def _of_normalisation(node: Any) -> Tensor | None:
    """Return the result of a normalisation, ``[n, c, *]`` or with the normalised dimensions."""
    kind, shift = kind_of_node(node), _leaf(inputs_of(node)[2])
    function = NODE_RULES[kind].function(node)
    assert function is not None
    unshifted = function(node._saved_input)
    if shift is None:
        return unshifted if node._saved_weight is None else None
    if kind == "NativeLayerNorm":
        return unshifted + shift
    return unshifted + shift.reshape(-1, *[1] * (unshifted.ndim - 2))


def _leaf(edge: Edge | None) -> Tensor | None:
    """Return the values of a parameter at an edge."""
    leaf = None if edge is None else leaf_of(edge)
    return None if leaf is None else leaf.detach()


_FUNCTIONS = [
    rule
    for rule in NODE_RULES.values()
    if isinstance(rule, (Entrywise, Power, Reduction)) or type(rule) is Product
]
_BY_KIND: Mapping[str, Callable[[Any], Tensor | None]] = {
    **dict.fromkeys((rule.kind for rule in _FUNCTIONS), _of_function),
    **dict.fromkeys((rule.kind for rule in normalisation.RULES), _of_normalisation),
    "Relu": _of_rectifier,
    "Add": _of_sum,
    "Sum": _of_total,
    "Mean": _of_total,
    "Convolution": _of_convolution,
    "Addmm": _of_linear_layer,
}

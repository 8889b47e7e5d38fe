"""Tensors without a dimension of examples, as torch's layers return them for unbatched inputs.

A policy that is called with a state ``[d]`` returns scores ``[c]``: one example with ``c`` entries,
not ``c`` examples. The shapes alone do not tell, but the calls of the layers behind them do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from math import prod
from typing import NamedTuple

from einconv_kfac.curvature.objective.graph import (
    Edge,
    inputs_of,
    kind_of_node,
    metadata_of,
    within,
)

_MIXING = frozenset(
    {"Mv", "Mm", "Bmm", "Addmv", "Addmm", "Baddbmm", "Addbmm", "Dot", "Vdot"}
    | {"Index", "IndexSelect", "Gather", "Take", "Embedding"}
)
"""Operations that may give a tensor a dimension of examples, those of a constant or of indices."""


class Batching(Enum):
    """What the first dimension of a layer's output is."""

    BATCH = "examples"
    ONE_ROW = "one example with one row"
    UNBATCHED = "no examples: the layer was called with an unbatched input"


class LayerOutput(NamedTuple):
    """The output of a layer's call.

    Args:
        layer: Name of the layer.
        batching: What its first dimension is.
        ndim: Number of its dimensions.
    """

    layer: str
    batching: Batching
    ndim: int


def unbatched_of(ends: Iterable[Edge], layers: Mapping[Edge, LayerOutput]) -> set[Edge]:
    """Return the tensors that have no dimension of examples.

    The operations between the layers and such a tensor act on entries, or reduce or select them.
    Tensors that depend on no layer, as a deviation that is a parameter, are like all the others.

    Args:
        ends: Outputs of a model or of its layers.
        layers: The outputs of calls of layers.

    Raises:
        ValueError: If a tensor is made from an unbatched output in another way, so that nothing
            tells whether it has such a dimension.
    """
    if all(own.batching is Batching.BATCH for own in layers.values()):
        return set()
    known = {edge: _is_unbatched(edge, layers) for edge in ends}
    others = {edge for edge, own in known.items() if own is None}
    found = {edge for edge, own in known.items() if own}
    return found | others if len(found) + len(others) == len(known) and found else found


def _is_unbatched(end: Edge, layers: Mapping[Edge, LayerOutput]) -> bool | None:
    """Return whether a tensor has no dimension of examples; ``None`` if no layer is behind it."""
    found, is_plain = _behind(within(end), layers)
    if not found:
        return None
    own, ndim = {layers[edge].batching for edge in found}, len(metadata_of(end).shape)
    if Batching.BATCH in own:
        return False
    if Batching.UNBATCHED not in own:
        return is_plain and ndim <= 1 and min(layers[edge].ndim for edge in found) > ndim
    if is_plain:
        return True
    if ndim > max(layers[edge].ndim for edge in found):  # weights computed for a batch
        return False
    names = sorted(layers[e].layer for e in found if layers[e].batching is Batching.UNBATCHED)
    raise ValueError(
        f"The model's output {list(metadata_of(end).shape)} must have a first dimension of "
        f"examples, got one computed from unbatched inputs of {names} by operations that may "
        "have added it. Add a batch dimension to the input with `x.unsqueeze(0)`."
    )


def _behind(end: Edge, layers: Mapping[Edge, LayerOutput]) -> tuple[Collection[Edge], bool]:
    """Return the outputs of layers next to a tensor, and whether no operation adds a dimension."""
    found: dict[Edge, None] = {}
    seen: set[Edge] = set()
    waiting, is_plain = [end], True
    while waiting:
        edge = waiting.pop()
        if edge in layers:
            found[edge] = None
        elif edge not in seen:
            seen.add(edge)
            before = [each for each in inputs_of(edge[0]) if each is not None]
            is_plain &= _keeps_dimensions(edge, before)
            waiting += before
    return found, is_plain


def _keeps_dimensions(edge: Edge, before: Collection[Edge]) -> bool:
    """Return whether the result of an operation is no larger than one of its inputs."""
    if not before:
        return True
    sizes = [each for each in before if hasattr(each[0], "_input_metadata")]
    largest = max((prod(metadata_of(each).shape) for each in sizes), default=0)
    return prod(metadata_of(edge).shape) <= largest and kind_of_node(edge[0]) not in _MIXING

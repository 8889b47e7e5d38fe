"""Activations in place of a whole tensor that is a view, as after an instance normalisation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.objective.graph import (
    kind_of_node,
    metadata_of,
    reached_nodes,
    zeros_at,
)
from einconv_kfac.curvature.objective.node_rule import Function, NodeRule
from einconv_kfac.curvature.objective.nodes.elementary import before_leaky_relu, saved_options
from einconv_kfac.curvature.objective.nodes.slices import is_assignment


@dataclass(frozen=True)
class Activation:
    """An activation, by the derivative of its derivative.

    Args:
        apply: The activation.
        options: Names of the arguments that this node saves.
        before: Returns the input for what the node saves; ``None`` if it does not follow.
    """

    apply: Callable[..., Tensor]
    options: tuple[str, ...]
    before: Callable[..., Tensor | None]


def _unknown(_: Tensor) -> None:
    """Return nothing: what is negative before a positive part is lost."""


def _itself(saved: Tensor, **_: Any) -> Tensor:
    """Return what a node saves, which is the input."""
    return saved


_ACTIVATIONS = {
    "ThresholdBackward": Activation(torch.relu, (), _unknown),
    "LeakyReluBackward": Activation(functional.leaky_relu, ("negative_slope",), before_leaky_relu),
    "HardtanhBackward": Activation(functional.hardtanh, ("min_val", "max_val"), _itself),
}


@dataclass(frozen=True)
class InPlace(NodeRule):
    """An activation that overwrites a view; other operations in place are not known.

    The node does not tell which operation it applies. The graph of its gradient shows it.
    """

    kind: str = "CopySlices"

    def is_linear(self, dependent: Sequence[bool]) -> bool:
        """See `NodeRule`; an assignment needs the node, see `is_assignment`."""
        return False

    def inputs(self, node: Any) -> Sequence[Tensor | None]:
        """See `NodeRule`."""
        found = activation_of(node)
        return [None] if found is None else [found[0].before(found[2], **found[1])]

    def function(self, node: Any) -> Function | None:
        """See `NodeRule`."""
        found = activation_of(node)
        return None if found is None else partial(found[0].apply, **found[1])


def activation_of(node: Any) -> tuple[Activation, dict[str, Any], Tensor] | None:
    """Return the activation that a node applies to a whole tensor in place.

    Args:
        node: A node of the kind ``CopySlices``.

    Returns:
        The activation, its options and what its derivative saves, shaped like the tensor; ``None``
        if it is another operation, or one on a part of the tensor.
    """
    if is_assignment(node):
        return None
    shape = torch.Size(metadata_of((node, 0)).shape)
    with torch.enable_grad():
        results = node(zeros_at((node, 0)).requires_grad_())
    several = results if isinstance(results, tuple) else (results,)
    nodes: list[Any] = [*reached_nodes([r for r in several if r is not None and r.requires_grad])]
    found = [each for each in nodes if kind_of_node(each) in _ACTIVATIONS]
    if len(found) != 1:
        return None
    own, saved = _ACTIVATIONS[kind_of_node(found[0])], found[0]._saved_self.detach()
    if not saved.is_contiguous() or saved.numel() != shape.numel():
        return None
    return own, saved_options(found[0], own.options), saved.reshape(shape)


RULES = (InPlace(),)

"""Numbers that a model returned, in which a loss is linear: losses that are parts of it."""

from __future__ import annotations

from einconv_kfac.curvature.objective.graph import Edge, Stops, dependents, first_met, inputs_of
from einconv_kfac.curvature.objective.loss_graph import is_linear


def linear_parts(root: Edge, is_number: Stops, is_other: Stops) -> set[Edge]:
    """Return the numbers in which a loss is linear, those inside of others among them.

    A product of two numbers counts as linear in neither.

    Args:
        root: The edge of the loss.
        is_number: Whether an edge is a number that a model returned.
        is_other: Whether it is another tensor of a model, behind which no numbers are looked for.
    """
    found: set[Edge] = set()
    waiting = [root]
    while waiting:
        top = waiting.pop()
        own = _linear_at(top, is_number, is_other) - found
        found |= own
        waiting += own
    return found - {root}


def _linear_at(top: Edge, is_number: Stops, is_other: Stops) -> set[Edge]:
    """Return the numbers that are met first below a tensor, and in which it is linear."""
    starts = [edge for edge in inputs_of(top[0]) if edge is not None]

    def stops(edge: Edge) -> bool:
        return is_number(edge) or is_other(edge)

    numbers = {edge for edge in first_met(starts, stops) if is_number(edge)}
    if not numbers:
        return numbers
    nodes = dependents(top, numbers.__contains__)

    def depends(edge: Edge | None) -> bool:
        return edge is not None and (edge in numbers or edge[0] in nodes)

    bent = [edge for node in nodes if not is_linear(node, depends) for edge in inputs_of(node)]
    return numbers - first_met([edge for edge in bent if edge is not None], stops)

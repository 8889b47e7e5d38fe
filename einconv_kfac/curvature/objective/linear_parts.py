"""Numbers that a model returned, in which a loss is linear: losses that are parts of it."""

from __future__ import annotations

from functools import partial

from einconv_kfac.curvature.objective.graph import Edge, Stops, dependents, first_met, inputs_of
from einconv_kfac.curvature.objective.loss_graph import is_linear


def linear_parts(root: Edge, is_number: Stops, is_other: Stops) -> set[Edge]:
    """Return the numbers in which a loss is linear, those inside of others among them.

    Args:
        root: The edge of the loss.
        is_number: Whether an edge is a number that a model returned.
        is_other: Whether it is another tensor of a model, behind which no numbers are looked for.
    """
    found: set[Edge] = set()
    waiting = [root]
    while waiting:
        top = waiting.pop()
        starts = [edge for edge in inputs_of(top[0]) if edge is not None]
        met = first_met(starts, lambda edge: is_number(edge) or is_other(edge))
        own = {e for e in met - found if is_number(e) and _is_linear_in(top, e)}
        found |= own
        waiting += own
    return found - {root}


def _is_linear_in(top: Edge, part: Edge) -> bool:
    """Return whether a tensor is linear in another one that it depends on."""
    nodes = dependents(top, partial(_same, part))

    def depends(edge: Edge | None) -> bool:
        return edge is not None and (edge == part or edge[0] in nodes)

    return all(is_linear(node, depends) for node in nodes)


def _same(first: Edge, second: Edge) -> bool:
    """Return whether two edges are the same."""
    return first == second

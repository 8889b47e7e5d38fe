"""Where the nodes and edges of a network's picture lie."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from einconv_kfac.network.operand import Leaf

if TYPE_CHECKING:  # a network draws itself
    from einconv_kfac.network.network import Network

COLUMN, ROW, MARGIN = 150.0, 110.0, 70.0
"""Distances in the picture: of columns, of rows, and to the border."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Bond:
    """Indices that connect the same nodes: an edge, an open leg, or a junction of several."""

    indices: tuple[str, ...]
    members: tuple[int, ...]
    open: bool


def bonds(network: Network) -> list[Bond]:
    """Group the indices by the nodes that have them, and by whether they are kept."""
    grouped: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for index in network.sizes:
        members = tuple(j for j, node in enumerate(network.nodes) if index in node.indices)
        grouped.setdefault((members, index in network.output), []).append(index)
    return [Bond(tuple(i), members, kept) for (members, kept), i in grouped.items()]


def positions(network: Network) -> list[Point]:
    """Place nodes in columns, by their distance from the first one."""
    leaves = {j for j, node in enumerate(network.nodes) if isinstance(node.operand, Leaf)}
    columns = _columns(len(network.nodes), bonds(network), leaves)
    tallest = max(map(len, columns))
    places: dict[int, Point] = {}
    for at, column in enumerate(columns):
        first = (tallest - len(column)) / 2
        for row, node in enumerate(column):
            places[node] = (MARGIN + at * COLUMN, 2 * MARGIN + (first + row) * ROW)
    return [places[node] for node in range(len(network.nodes))]


def center(points: Iterable[Point]) -> Point:
    """Return the mean of points."""
    xs, ys = zip(*points)
    return sum(xs) / len(xs), sum(ys) / len(ys)


def _columns(count: int, edges: list[Bond], leaves: set[int]) -> list[list[int]]:
    """Return the nodes in order of their distance from the first; others come last.

    Only bonds with a pattern or a delta count, so that what the caller's tensors share does
    not draw together what patterns keep apart.
    """
    pairs = [b.members for b in edges if len(b.members) == 2 and not leaves.issuperset(b.members)]
    left, columns = set(range(count)), []
    while left:
        column = [min(left)]
        while column:
            left -= set(column)
            columns.append(column)
            near = {n for p in pairs if set(p) & set(column) for n in p}
            column = sorted(near & left)
    return columns

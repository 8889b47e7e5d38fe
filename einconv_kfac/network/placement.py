"""The positions of nodes and edges in a network's picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from einconv_kfac.network.network import Network
from einconv_kfac.network.operand import Leaf
from einconv_kfac.network.picture import Point

COLUMN_PX, ROW_PX, MARGIN_PX = 150.0, 110.0, 70.0
"""Distances in the picture, in pixels: of columns, of rows, and to the border."""


@dataclass(frozen=True)
class Bond:
    """Indices that connect the same nodes: an edge, an open end, or a junction of several edges."""

    indices: tuple[str, ...]
    members: tuple[int, ...]
    open: bool


def bonds(network: Network) -> list[Bond]:
    """Group the indices by the nodes that have them, and by whether they are in the output."""
    grouped: dict[tuple[tuple[int, ...], bool], list[str]] = {}
    for index in network.sizes:
        members = tuple(j for j, node in enumerate(network.nodes) if index in node.indices)
        grouped.setdefault((members, index in network.output), []).append(index)
    return [Bond(tuple(i), members, kept) for (members, kept), i in grouped.items()]


def positions(network: Network) -> list[Point]:
    """Return the position of every node, in columns by the distance from the first node."""
    leaves = {j for j, node in enumerate(network.nodes) if isinstance(node.operand, Leaf)}
    columns = _columns(len(network.nodes), bonds(network), leaves)
    tallest = max(map(len, columns))
    points: dict[int, Point] = {}
    for at, column in enumerate(columns):
        first = (tallest - len(column)) / 2
        for row, node in enumerate(column):
            points[node] = (MARGIN_PX + at * COLUMN_PX, 2 * MARGIN_PX + (first + row) * ROW_PX)
    return [points[node] for node in range(len(network.nodes))]


def center(points: Iterable[Point]) -> Point:
    """Return the mean of points."""
    xs, ys = zip(*points)
    return sum(xs) / len(xs), sum(ys) / len(ys)


def _columns(count: int, edges: list[Bond], leaves: set[int]) -> list[list[int]]:
    """Return columns of nodes with the same distance from the first node of their component.

    The distance counts bonds that involve a pattern or a delta. Bonds between two of the
    caller's tensors are ignored: they would pull the tensors into adjacent columns.
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

"""Drawing of tensor networks: tensors as nodes, indices as edges."""

from __future__ import annotations

from einconv_kfac.network.network import Network, check_network
from einconv_kfac.network.operand import Delta, Leaf, Operand, Pattern
from einconv_kfac.network.picture import RADIUS_PX, Mark, Picture, Point
from einconv_kfac.network.placement import (
    COLUMN_PX,
    MARGIN_PX,
    ROW_PX,
    bonds,
    center,
    positions,
)

_SHAPES: dict[type[Operand], tuple[str, str]] = {
    Leaf: ("circle", "#cfe3f7"),
    Pattern: ("box", "#f9d9a8"),
    Delta: ("diamond", "#ffffff"),
}
"""Kind and color of the mark of every kind of operand."""


def draw(network: Network) -> Picture:
    """Return the picture of a network; a notebook displays it.

    Circles are the caller's tensors, boxes index patterns, diamonds Kronecker deltas. An edge
    is labelled with its indices and their sizes. An edge with an open end is an index of the
    output. A dot joins an index of more than two nodes, or ends an index of one node that is
    summed.

    Raises:
        TypeError: If the argument is no network.

    >>> from einconv_kfac.expressions import convNd_forward
    >>> from einconv_kfac.geometry import conv_geometry
    >>> picture = draw(convNd_forward.network(conv_geometry((8,), 3), 2, 4, 5))
    >>> picture.svg[:4]  # picture.save("forward.svg") and .save("forward.png") write files
    '<svg'
    """
    check_network(network)
    points = positions(network)
    top, bottom = (extreme(y for _, y in points) for extreme in (min, max))
    lines: list[Mark] = []
    for bond in bonds(network):
        label = " ".join(f"{index}={network.sizes[index]}" for index in bond.indices)
        lines += _bond(label, [points[node] for node in bond.members], bond.open, top, bottom)
    shapes = [_shape(node.operand, point) for node, point in zip(network.nodes, points)]
    lowest = max(y for mark in lines if mark.kind != "curve" for _, y in mark.points)
    width = max(x for x, _ in points) + MARGIN_PX
    return Picture((*lines, *shapes), max(width, 3 * MARGIN_PX), lowest + MARGIN_PX / 2)


def _bond(label: str, ends: list[Point], kept: bool, top: float, bottom: float) -> list[Mark]:
    """Return the marks of a bond with its label."""
    if len(ends) == 1:
        (x, y), way = ends[0], 1 if kept else -1
        foot = (x, y + way * 2.2 * RADIUS_PX)
        end = [] if kept else [Mark("dot", (foot,))]
        return [Mark("line", ((x, y), foot)), *end, Mark("text", ((x, foot[1] + way * 12),), label)]
    if len(ends) == 2 and not kept:
        bow = _bow(ends[0], ends[1], bottom)
        return [
            Mark("curve", (ends[0], bow, ends[1])),
            Mark("text", (_on_curve(ends, bow),), label),
        ]
    x, _ = center(ends)
    joint = (x, top - 0.8 * MARGIN_PX)
    marks = [Mark("line", (end, joint)) for end in ends]
    marks.append(Mark("dot", (joint,)))
    if kept:
        marks.append(Mark("line", (joint, (joint[0], joint[1] - RADIUS_PX))))
    return [*marks, Mark("text", ((joint[0], joint[1] - RADIUS_PX - 6),), label)]


def _bow(start: Point, end: Point, bottom: float) -> Point:
    """Return the control point of an edge: straight between adjacent nodes, else bowed."""
    (x0, y0), (x1, y1) = start, end
    x, y = center([start, end])
    if abs(x1 - x0) > 1.5 * COLUMN_PX:
        return x, 2 * bottom - y + 3 * MARGIN_PX
    return (x + MARGIN_PX, y) if x0 == x1 and abs(y1 - y0) > 1.5 * ROW_PX else (x, y)


def _on_curve(ends: list[Point], bow: Point) -> Point:
    """Return the position of an edge's label."""
    x, y = center([center(ends), bow])
    return x, y - 6


def _shape(operand: Operand, point: Point) -> Mark:
    """Return the mark of a node."""
    summed = operand.summed if isinstance(operand, Pattern) else ()
    label = f"Σ{''.join(summed)} {operand.name}" if summed else operand.name
    kind, color = _SHAPES[type(operand)]
    return Mark(kind, (point,), label, color)

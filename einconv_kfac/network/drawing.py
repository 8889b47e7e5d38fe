"""Pictures of tensor networks: tensors as nodes, indices as edges."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from einconv_kfac.network.operand import Delta, Leaf, Operand
from einconv_kfac.network.placement import COLUMN, MARGIN, ROW, Point, bonds, center, positions

if TYPE_CHECKING:  # a network draws itself
    from einconv_kfac.network.network import Network

RADIUS = 22.0
INK, LEAF, PATTERN, DELTA = "#222222", "#cfe3f7", "#f9d9a8", "#ffffff"


@dataclass(frozen=True)
class Mark:
    """One stroke, shape or text of a picture, between or at points."""

    kind: str
    points: tuple[Point, ...]
    text: str = ""
    fill: str = INK


@dataclass(frozen=True)
class Picture:
    """The picture of a network; a notebook shows it by itself."""

    marks: tuple[Mark, ...]
    width: float
    height: float

    @property
    def svg(self) -> str:
        """The picture as SVG text."""
        size = f'width="{self.width:.0f}" height="{self.height:.0f}"'
        body = "\n".join(map(_svg, self.marks))
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n'
            f'<rect width="100%" height="100%" fill="white"/>\n{body}\n</svg>\n'
        )

    def _repr_svg_(self) -> str:
        return self.svg

    def save(self, path: str | Path) -> None:
        """Write the picture to a file that ends in ``.svg`` or ``.png``.

        Raises:
            ValueError: If it ends in something else.
            ImportError: If a PNG is asked for and matplotlib is not installed.
        """
        kind = Path(path).suffix
        if kind == ".svg":
            Path(path).write_text(self.svg, encoding="utf-8")
        elif kind == ".png":
            _save_png(self, path)
        else:
            raise ValueError(f"`path` must end in .svg or .png, got {str(path)!r}.")


def draw(network: Network) -> Picture:
    """Return the picture of a network.

    Circles are the caller's tensors, boxes index patterns, diamonds Kronecker deltas. An edge
    carries its indices with their sizes; a dot joins more than two ends, or ends
    an index that is summed alone; an open end is kept.
    """
    places = positions(network)
    top, bottom = (extreme(y for _, y in places) for extreme in (min, max))
    lines: list[Mark] = []
    for bond in bonds(network):
        label = " ".join(f"{index}={network.sizes[index]}" for index in bond.indices)
        lines += _bond(label, [places[node] for node in bond.members], bond.open, top, bottom)
    shapes = [_shape(node.operand, place) for node, place in zip(network.nodes, places)]
    lowest = max(y for mark in lines if mark.kind != "curve" for _, y in mark.points)
    width = max(x for x, _ in places) + MARGIN
    return Picture((*lines, *shapes), max(width, 3 * MARGIN), lowest + MARGIN / 2)


def _bond(label: str, ends: list[Point], kept: bool, top: float, bottom: float) -> list[Mark]:
    """Return the marks of a bond with its label."""
    if len(ends) == 1:
        (x, y), way = ends[0], 1 if kept else -1
        foot = (x, y + way * 2.2 * RADIUS)
        end = [] if kept else [Mark("dot", (foot,))]
        return [Mark("line", ((x, y), foot)), *end, Mark("text", ((x, foot[1] + way * 12),), label)]
    if len(ends) == 2 and not kept:
        bow = _bow(ends[0], ends[1], bottom)
        return [
            Mark("curve", (ends[0], bow, ends[1])),
            Mark("text", (_on_curve(ends, bow),), label),
        ]
    x, _ = center(ends)
    joint = (x, top - 0.8 * MARGIN)
    marks = [Mark("line", (end, joint)) for end in ends]
    marks.append(Mark("dot", (joint,)))
    if kept:
        marks.append(Mark("line", (joint, (joint[0], joint[1] - RADIUS))))
    return [*marks, Mark("text", ((joint[0], joint[1] - RADIUS - 6),), label)]


def _bow(start: Point, end: Point, bottom: float) -> Point:
    """Return the control point of an edge: straight to a neighbour, bowed further away."""
    (x0, y0), (x1, y1) = start, end
    x, y = center([start, end])
    if abs(x1 - x0) > 1.5 * COLUMN:
        return x, 2 * bottom - y + 3 * MARGIN
    return (x + MARGIN, y) if x0 == x1 and abs(y1 - y0) > 1.5 * ROW else (x, y)


def _on_curve(ends: list[Point], bow: Point) -> Point:
    """Return where the label of an edge goes."""
    x, y = center([center(ends), bow])
    return x, y - 6


def _shape(operand: Operand, place: Point) -> Mark:
    """Return the mark of a node."""
    if isinstance(operand, Leaf):
        return Mark("circle", (place,), operand.name, LEAF)
    if isinstance(operand, Delta):
        return Mark("diamond", (place,), operand.name, DELTA)
    summed = f"Σ{''.join(operand.summed)} " if operand.summed else ""
    return Mark("box", (place,), f"{summed}{operand.name}", PATTERN)


def _svg(mark: Mark) -> str:
    """Return a mark as SVG."""
    (x, y), r = mark.points[0], RADIUS
    stroke = f'stroke="{INK}" stroke-width="1.5"'
    text = (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" dominant-baseline="middle" '
        f'font-size="%d" fill="{INK}" stroke="%s" stroke-width="4" paint-order="stroke">'
        f"{escape(mark.text)}</text>"
    )
    if mark.kind == "text":
        return text % (12, "white")
    if mark.kind == "dot":
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{INK}"/>'
    if mark.kind in ("line", "curve"):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in mark.points[1:])
        letter = "Q" if mark.kind == "curve" else "L"
        return f'<path d="M{x:.1f},{y:.1f} {letter}{path}" fill="none" {stroke}/>'
    outline = {
        "circle": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{r}"',
        "box": f'<rect x="{x - r:.1f}" y="{y - r:.1f}" width="{2 * r}" height="{2 * r}" rx="5"',
        "diamond": f'<path d="M{x - r:.1f},{y:.1f} L{x:.1f},{y - r:.1f} L{x + r:.1f},{y:.1f} '
        f'L{x:.1f},{y + r:.1f} Z"',
    }[mark.kind]
    return f'{outline} fill="{mark.fill}" {stroke}/>{text % (15, mark.fill)}'


def _save_png(picture: Picture, path: str | Path) -> None:
    """Write a picture with matplotlib."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra, for this alone)
    except ImportError as error:
        raise ImportError(
            "a PNG needs matplotlib: pip install matplotlib, or save as .svg."
        ) from error
    figure = Figure(figsize=(picture.width / 72, picture.height / 72), dpi=144)
    axes: Any = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, picture.width), ylim=(picture.height, 0))
    axes.axis("off")
    for mark in picture.marks:
        _plot(axes, mark)
    figure.savefig(path, facecolor="white")


def _plot(axes: Any, mark: Mark) -> None:
    """Add a mark to matplotlib's axes."""
    (x, y), center_text = mark.points[0], {"ha": "center", "va": "center"}
    if mark.kind == "text":
        halo = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        axes.text(x, y, mark.text, fontsize=9, color=INK, bbox=halo, **center_text)
    elif mark.kind in ("line", "curve"):
        axes.plot(*zip(*_sampled(mark.points)), color=INK, linewidth=1.2, zorder=0)
    elif mark.kind == "dot":
        axes.plot(x, y, "o", color=INK, markersize=4)
    else:
        marker = {"circle": "o", "box": "s", "diamond": "D"}[mark.kind]
        size = RADIUS * (1.45 if mark.kind == "diamond" else 2)
        style = {"markerfacecolor": mark.fill, "markeredgecolor": INK, "markersize": size}
        axes.plot(x, y, marker, **style)
        axes.text(x, y, mark.text, fontsize=11, color=INK, **center_text)


def _sampled(points: tuple[Point, ...]) -> list[Point]:
    """Return points along a line, or along the curve with one control point."""
    if len(points) == 2:
        return list(points)
    (x0, y0), (x1, y1), (x2, y2) = points
    steps = [j / 24 for j in range(25)]
    weights = [((1 - t) ** 2, 2 * t * (1 - t), t**2) for t in steps]
    return [(a * x0 + b * x1 + c * x2, a * y0 + b * y1 + c * y2) for a, b, c in weights]

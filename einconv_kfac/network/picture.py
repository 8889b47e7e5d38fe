"""Pictures of marks on a plane, as SVG text or as a PNG file."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

Point = tuple[float, float]
"""Horizontal and vertical position, in pixels from the upper left corner."""

RADIUS_PX = 22.0
"""Radius of circles, and half the size of boxes and diamonds."""

INK = "#222222"


@dataclass(frozen=True)
class Mark:
    """A line, shape or text of a picture.

    Args:
        kind: ``"line"``, ``"curve"``, ``"dot"``, ``"text"``, ``"circle"``, ``"box"`` or
            ``"diamond"``.
        points: The points that a line or curve connects, or the center of a shape or text.
        text: Text of the mark or label of the shape.
        fill: Color of a shape.
    """

    kind: str
    points: tuple[Point, ...]
    text: str = ""
    fill: str = INK


@dataclass(frozen=True)
class Picture:
    """A picture; a notebook displays it as SVG. Sizes are in pixels."""

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
            ImportError: If it ends in ``.png`` and matplotlib is not installed.
        """
        kind = Path(path).suffix
        if kind == ".svg":
            Path(path).write_text(self.svg, encoding="utf-8")
        elif kind == ".png":
            _save_png(self, path)
        else:
            raise ValueError(f"`path` must end in .svg or .png, got {str(path)!r}.")


def _svg(mark: Mark) -> str:
    """Return a mark as SVG."""
    (x, y), r = mark.points[0], RADIUS_PX
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
        size = RADIUS_PX * (1.45 if mark.kind == "diamond" else 2)
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

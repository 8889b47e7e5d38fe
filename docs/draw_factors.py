"""Draw docs/factors.svg: the regions of three lags of a small convolution."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from einconv_kfac.curvature.factors.indices.lag_pairs import Lag, lags
from einconv_kfac.geometry import Axis

AXIS = Axis(input_size=6, kernel_size=3, padding=(1, 1))


def lag(distance: int) -> Lag:
    """Return the lag of this distance."""
    return next(found for found in lags(AXIS) if found.distance == distance)


def region_of(position: int, found: Lag) -> int | None:
    """Return the index of the region that holds a position, if any."""
    inside = [i for i, (low, high) in enumerate(found.regions) if low <= position < high]
    return inside[0] if inside else None


def main() -> None:
    """Draw one panel per lag."""
    mpl.rcParams["svg.hashsalt"] = "factors"  # the same file on every run
    figure = Figure(figsize=(9, 3.8))
    colors = mpl.colormaps["tab20c"]
    for panel, distance in zip(figure.subplots(1, 3), ((0, 0), (0, 1), (1, 1))):
        rows, columns = lag(distance[0]), lag(distance[1])
        for i in range(AXIS.input_size):
            for j in range(AXIS.input_size):
                row, column = region_of(i, rows), region_of(j, columns)
                inside = row is not None and column is not None
                color = colors(4 * (row or 0) + (column or 0)) if inside else "white"
                panel.add_patch(
                    mpl.patches.Rectangle((j, i), 1, 1, facecolor=color, edgecolor="gray")
                )
        start, stop = (1.5, 1.5), (1.5 + distance[1], 1.5 + distance[0])
        if any(distance):
            panel.annotate("", stop, start, arrowprops={"arrowstyle": "->", "linewidth": 2})
        else:
            panel.plot(*start, "ko")
        regions = len(rows.regions) * len(columns.regions)
        pairs = len(rows.entries) * len(columns.entries)
        panel.set(xlim=(0, AXIS.input_size), ylim=(AXIS.input_size, 0), aspect="equal")
        panel.set(xticks=[], yticks=[])
        panel.set_title(f"lag {distance}\n{regions} region(s) for {pairs} pairs (k, k')")
    figure.tight_layout()
    figure.savefig(Path(__file__).with_name("factors.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()

"""Tables as text."""

from __future__ import annotations

from collections.abc import Sequence


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return left-aligned columns as text.

    >>> print(table(("layer", "error"), [("0", "0.5"), ("head", "0")]))
    layer  error
    0      0.5
    head   0
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
        for row in (titles, *rows)
    )
    return "\n".join(lines)

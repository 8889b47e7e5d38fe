"""Blocks of outputs along one dimension, and the positions that each of them meets."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from einconv_kfac.geometry import Axis

FAST_PRODUCT_ROWS = 16
"""Rows and columns from which products of matrices are fast."""


@dataclass(frozen=True)
class Band:
    """Equal blocks of outputs along one axis.

    Args:
        axis: The dimension.
        first: The first block's first output.
        outputs: Outputs in a block.
        width: Positions that are multiplied with each other; they include those that a block meets.
        count: Number of blocks.
    """

    axis: Axis
    first: int
    outputs: int
    width: int
    count: int

    def start(self, block: int) -> int:
        """Return the first position that a block meets."""
        return (self.first + block * self.outputs) * self.axis.stride - self.axis.padding[0]


@lru_cache(maxsize=1024)
def bands(axis: Axis, channels: int = 1) -> tuple[Band, ...]:
    """Return the blocks that cover the outputs of ``axis``: equal ones, and one for the rest.

    Args:
        axis: The dimension.
        channels: Channels that each position has; products are at least `FAST_PRODUCT_ROWS` wide.
    """
    size = axis.output_size
    least = max(axis.span, -(-FAST_PRODUCT_ROWS // channels))
    step = 4 if channels < 4 else 1
    widths = [least, *range(-(-least // step) * step, 4 * least + 1, step)]
    outputs = {width: min(size, (width - axis.span) // axis.stride + 1) for width in widths}
    width = min(widths, key=lambda width: -(-size // outputs[width]) * width**2)
    count = -(-size // outputs[width])
    each = -(-size // count)
    found = [Band(axis, 0, each, width, size // each)]
    if size % each:
        found.append(Band(axis, size - size % each, size % each, width, 1))
    return tuple(found)


def are_views(groups: int, channels: int) -> bool:
    """Return whether blocks are views of rows: in batches of products of single channels."""
    return groups > 1 and channels == 1

"""One spatial dimension of a convolution."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass

from einconv_kfac.geometry.spellings import LARGEST_SIZE, as_integer, is_integer


@dataclass(frozen=True)
class Axis:
    """One spatial dimension of a convolution.

    Args:
        input_size: Number of input positions ``I``.
        kernel_size: Number of kernel entries ``K``.
        stride: Input positions from the window of one output to that of the next.
        padding: Number of zeros on the left and on the right; a negative number on the right
            drops the last inputs.
        dilation: Input positions from one kernel entry to the next.

    Raises:
        ValueError: If a size is not positive, or larger than `LARGEST_SIZE`, the padding is
            negative on the left, or the dilated kernel does not fit into the padded input.
        TypeError: If a size is not an integer, or the padding is not a pair of them.
    """

    input_size: int
    kernel_size: int
    stride: int = 1
    padding: tuple[int, int] = (0, 0)
    dilation: int = 1

    def __post_init__(self) -> None:
        for name in ("input_size", "kernel_size", "stride", "dilation"):
            as_integer(getattr(self, name), name, minimum=1)
        pair = self.padding
        if not isinstance(pair, tuple) or len(pair) != 2 or not all(map(is_integer, pair)):
            raise TypeError(f"`padding` must be two integers (left, right), got {pair!r}.")
        if self.padding[0] < 0:
            raise ValueError(f"`padding` must not be negative, got {self.padding}.")
        if self.padded_size > LARGEST_SIZE:
            raise ValueError(
                f"`padding` must leave at most {LARGEST_SIZE} positions, got {reprlib.repr(pair)} "
                f"for an input of {self.input_size}."
            )
        if self.span > self.padded_size:
            raise ValueError(
                f"`kernel_size` must fit into the padded input: {self.kernel_size} entries with "
                f"dilation {self.dilation} span {self.span} positions, got an input of "
                f"{self.input_size} padded to {self.padded_size}."
            )

    @property
    def span(self) -> int:
        """Number of positions from the first to the last kernel entry, ``D (K - 1) + 1``."""
        return (self.kernel_size - 1) * self.dilation + 1

    @property
    def padded_size(self) -> int:
        """Number of input positions with the padding on both sides."""
        return self.input_size + sum(self.padding)

    @property
    def output_size(self) -> int:
        """Number of output positions ``O``."""
        return 1 + (self.padded_size - self.span) // self.stride

    @property
    def covered_size(self) -> int:
        """Padded positions up to the end of the last window, ``(O - 1) S + D (K - 1) + 1``."""
        return (self.output_size - 1) * self.stride + self.span

    @property
    def exact_padding(self) -> tuple[int, int]:
        """Padding with which the input ends with the last window; may be negative on the right."""
        left = self.padding[0]
        return left, self.covered_size - self.input_size - left

    def input_position(self, kernel: int, output: int) -> int:
        """Return ``output * S + kernel * D - p_left``; may be a position in the padding."""
        as_integer(kernel, "kernel")
        as_integer(output, "output")
        return output * self.stride + kernel * self.dilation - self.padding[0]

    def outputs(self, kernel: int) -> range:
        """Return the outputs for which kernel entry ``kernel`` meets an input, not padding."""
        as_integer(kernel, "kernel")
        offset = kernel * self.dilation - self.padding[0]
        first = max(0, -(offset // self.stride))
        last = min(self.output_size - 1, (self.input_size - 1 - offset) // self.stride)
        return range(first, max(first, last + 1))

"""The frozen convolution cases that every test module shares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.geometry import Geometry, conv_geometry


@dataclass(frozen=True)
class ConvCase:
    """One convolution: channels, input size, and torch's keyword arguments."""

    name: str
    in_channels: int
    out_channels: int
    input_size: tuple[int, ...]
    kernel_size: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    batch: int = 3

    @property
    def groups(self) -> int:
        return int(self.options.get("groups", 1))

    @property
    def ungrouped(self) -> dict[str, Any]:
        """The options without ``groups``, for operations without groups."""
        return {key: value for key, value in self.options.items() if key != "groups"}

    @property
    def geometry(self) -> Geometry:
        return conv_geometry(self.input_size, self.kernel_size, **self.options)

    def input(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        shape = (self.batch, self.in_channels, *self.input_size)
        return torch.randn(shape, generator=generator, dtype=dtype)

    def weight(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        shape = (self.out_channels, self.in_channels // self.groups, *self.kernel_size)
        return torch.randn(shape, generator=generator, dtype=dtype)

    def output_like(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(2)
        shape = (self.batch, self.out_channels, *self.geometry.output_size)
        return torch.randn(shape, generator=generator, dtype=dtype)


CONV_CASES = (
    ConvCase("1d", 2, 3, (11,), (4,)),
    ConvCase("1d-stride-padding", 2, 3, (10,), (3,), {"stride": 2, "padding": 1}),
    ConvCase("1d-same-even", 2, 4, (9,), (4,), {"padding": "same"}),
    ConvCase("1d-dilated", 4, 2, (13,), (3,), {"dilation": 3, "padding": (2,), "groups": 2}),
    ConvCase("1d-down-sampling", 2, 3, (12,), (2,), {"stride": 4}),
    ConvCase("1d-swap", 2, 3, (8,), (3,), {"dilation": 3}),
    ConvCase("1d-kernel-in-padding", 2, 3, (1,), (3,), {"padding": 1}),
    ConvCase("2d", 2, 3, (6, 7), (3, 2)),
    ConvCase("2d-padded", 3, 4, (5, 6), (3, 3), {"padding": 1}),
    ConvCase("2d-strided", 4, 6, (9, 7), (3, 3), {"stride": 2, "padding": 1, "groups": 2}),
    ConvCase("2d-same", 2, 2, (6, 5), (4, 3), {"padding": "same", "dilation": (1, 2)}),
    ConvCase("2d-valid", 2, 2, (6, 5), (2, 3), {"padding": "valid"}),
    ConvCase("2d-dense", 3, 4, (6, 8), (2, 4), {"stride": (2, 4)}),
    ConvCase("2d-dense-remainder", 3, 4, (7, 9), (2, 4), {"stride": (2, 4)}),
    ConvCase("2d-1x1", 4, 4, (5, 4), (1, 1), {"groups": 2}),
    ConvCase("2d-1x1-strided-odd", 2, 3, (7, 5), (1, 1), {"stride": 2}),
    ConvCase("2d-depthwise", 4, 8, (7, 7), (3, 3), {"padding": 1, "groups": 4}),
    ConvCase("2d-whole", 2, 3, (4, 3), (4, 3)),
    ConvCase("2d-mixed", 4, 4, (9, 8), (3, 2), {"stride": (2, 3), "padding": (2, 1),
                                              "dilation": (2, 1), "groups": 2}),
    ConvCase("3d", 2, 3, (5, 4, 6), (2, 3, 2), {"padding": (1, 0, 1)}),
    ConvCase("3d-strided", 4, 2, (5, 6, 7), (3, 2, 3), {"stride": (2, 1, 3), "padding": 1,
                                                      "dilation": (1, 2, 1), "groups": 2}),
    ConvCase("3d-dense", 2, 2, (4, 6, 2), (2, 3, 1), {"stride": (2, 3, 1)}),
)  # fmt: skip
"""Convolutions that torch runs itself, in one to three dimensions."""

HIGH_CASES = (
    ConvCase("4d", 2, 4, (3, 2, 4, 3), (2, 1, 3, 2), {"stride": (1, 1, 2, 1), "padding": 1,
                                                      "groups": 2}, 2),
    ConvCase("5d", 1, 2, (2, 3, 2, 2, 3), (2, 2, 1, 2, 2), {"dilation": (1, 2, 1, 1, 1)}, 2),
)  # fmt: skip
"""Convolutions in four and five dimensions, of which torch has none."""

UNMET = ConvCase("1d-window-in-padding", 2, 3, (2,), (1,), {"stride": 10, "padding": 4})
"""A convolution whose windows meet nothing but padding, so that all it gives is zero."""


def case_id(case: ConvCase) -> str:
    return case.name

"""The layers of real networks whose factors are measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.geometry import Geometry, conv_geometry, conv_transpose_geometry

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Layer:
    """A convolution, the shape of its input, and where it comes from."""

    network: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(hash=False)
    transposed: bool = False

    @property
    def geometry(self) -> Geometry:
        """The convolution, or the one that the transposed one is the adjoint of."""
        make = conv_transpose_geometry if self.transposed else conv_geometry
        return make(self.shape[2:], **self.options)

    @property
    def groups(self) -> int:
        """Number of channel groups."""
        return int(self.options.get("groups", 1))

    @property
    def problem(self) -> Problem:
        """What the choice of the algorithm depends on."""
        channels, threads = self.shape[1] // self.groups, torch.get_num_threads()
        return Problem(
            self.geometry, self.shape[0], channels, torch.float32, "cpu", threads=threads
        )

    @property
    def kind(self) -> str:
        """Whether its windows overlap."""
        overlapping = any(a.kernel_size > a.stride for a in self.geometry.axes)
        return "overlapping" if overlapping or self.transposed else "dense"

    @property
    def is_large(self) -> bool:
        """Whether it has stride 1 and images of 14 pixels and more."""
        axes = self.geometry.axes
        return self.kind == "overlapping" and all(
            a.stride == 1 and a.input_size >= 14 for a in axes
        )

    @property
    def result_size(self) -> int:
        """Number of elements of the factors."""
        return self.groups * self.problem.size**2

    def __str__(self) -> str:
        sizes = "x".join(map(str, self.shape))
        words = [f"{key[0]}{_short(value)}" for key, value in self.options.items()]
        return f"{sizes} {' '.join(words)}{' transposed' if self.transposed else ''}"


def _short(value: Any) -> str:
    values = value if isinstance(value, tuple) else (value,)
    return str(values[0]) if len(set(values)) == 1 else "x".join(map(str, values))


EXTRA = (
    Layer("1d", (32, 64, 1024), {"kernel_size": (9,), "padding": (4,)}),
    Layer("1d", (8, 128, 2048), {"kernel_size": (3,), "padding": (8,), "dilation": (8,)}),
    Layer("3d", (8, 32, 16, 28, 28), {"kernel_size": (3, 3, 3), "padding": (1, 1, 1)}),
    Layer("3d", (8, 3, 16, 56, 56), {"kernel_size": (3, 7, 7), "stride": (1, 2, 2),
                                     "padding": (1, 3, 3)}),
    Layer("transposed", (32, 128, 14, 14), {"kernel_size": (4, 4), "stride": (2, 2),
                                            "padding": (1, 1)}, transposed=True),
)  # fmt: skip


def layers() -> Iterator[Layer]:
    """Yield every distinct layer."""
    seen = set()
    for network, found in json.loads((HERE / "conv_layers.json").read_text()).items():
        batch = 8 if max(layer["in_shape"][-1] for layer in found) > 64 else 32
        batch = 8 if network == "alexnet" else batch
        for layer in found:
            names = ("kernel_size", "stride", "padding", "dilation", "groups")
            values = [tuple(v) if isinstance(v := layer[n], list) else v for n in names]
            shape = (batch, *layer["in_shape"])
            if (shape, *values) not in seen:
                seen.add((shape, *values))
                yield Layer(network, shape, dict(zip(names, values)))
    yield from EXTRA

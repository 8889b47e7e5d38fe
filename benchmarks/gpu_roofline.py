"""Predicted times of input factors on a GPU, from what the algorithms ask of a simulated one.

No GPU is needed. The device of tests/device/simulation counts, from shapes, the bytes that each
kernel moves and the operations of each product. A kernel takes the longer of the two at the rates
below, and two microseconds at least. "Host" is the time to launch the kernels, which overlaps.
"Fused" is one read of the input and half of the product with the unfolded input, at these rates, in
one kernel. Rates are assumptions for an H100: about 60 per cent of the peaks of its data sheet.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests/device/simulation"))

import simulated_device as device  # before torch
import torch
from factor_layers import Layer, layers
from tables import RESULTS, command_line, publish

from einconv_kfac.curvature.factors import conv_input_factor
from einconv_kfac.curvature.factors.choice import applicable, choose
from einconv_kfac.curvature.factors.problem import Problem

BYTES_PER_SECOND = 2.5e12
OPERATIONS_PER_SECOND = {"float32": 5e13, "tf32": 2.5e14, "bfloat16": 5e14}
SHORTEST_KERNEL = 2e-6
LAUNCH = 6e-6
BATCH = 64
NETWORKS = ("resnet18", "resnet50", "mobilenet_v2")


def kernel_seconds(launch: Any, precision: str) -> float:
    """Return the predicted time of an operator's kernels."""
    rate = OPERATIONS_PER_SECOND[precision]
    if precision == "bfloat16" and "dtype" not in launch.name and launch.name not in MIXED:
        rate = OPERATIONS_PER_SECOND["float32"]
    busy = max(launch.moved / BYTES_PER_SECOND, launch.operations / rate)
    return float(launch.kernels * max(SHORTEST_KERNEL, busy / launch.kernels))


MIXED = ("addmm", "baddbmm")
"""Operators that multiply low precision with sums in float32; the others multiply in float32."""


def predicted(layer: Layer, precision: str) -> tuple[str, dict[str, tuple[float, float]]]:
    """Return the choice, and by algorithm the milliseconds of device and host."""
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    tf32 = precision == "tf32"
    shape = (BATCH, *layer.shape[1:])
    channels = shape[1] // layer.groups
    problem = Problem(layer.geometry, BATCH, channels, dtype, "cuda", tf32)
    found = {}
    with device.simulated(shapes_only=True) as record:
        x = device.to_device(torch.empty(shape, dtype=dtype, device="meta"))
        for name in applicable(problem):
            record.reset()
            conv_input_factor(x, **layer.options, algorithm=name)
            times = [kernel_seconds(launch, precision) for launch in record.launched]
            found[name] = 1e3 * sum(times), 1e3 * LAUNCH * record.launches
    return choose(problem), found


def fused(layer: Layer, precision: str) -> float:
    """Return the milliseconds of one read and of half of the product."""
    size, entries = (2 if precision == "bfloat16" else 4), layer.geometry.positions * BATCH
    moved = size * BATCH * torch.Size(layer.shape[1:]).numel() + 4 * layer.result_size
    products = layer.result_size * entries  # two operations for each of half of the entries
    return 1e3 * max(moved / BYTES_PER_SECOND, products / OPERATIONS_PER_SECOND[precision])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    parser.add_argument("--networks", default=",".join(NETWORKS), help="of conv_layers.json")
    parser.add_argument("--layers", type=int, default=1000, help="at most, of each network")
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder of the table")
    options = parser.parse_args(arguments)
    lines, sums = [], Counter[tuple[str, str, str]]()
    for network in options.networks.split(","):
        own = [layer for layer in layers() if layer.network == network][: options.layers]
        for precision in OPERATIONS_PER_SECOND:
            for layer in own:
                choice, found = predicted(layer, precision)
                best = min(found, key=lambda name: max(found[name]))
                bound = fused(layer, precision)
                row = {"chosen": max(found[choice]), "best": max(found[best]), "fused": bound}
                sums.update({(network, precision, key): value for key, value in row.items()})
                text = " ".join(f"{key} {value:8.3f}" for key, value in row.items())
                others = " ".join(f"{k} {a:.3f}/{b:.3f}" for k, (a, b) in found.items())
                lines.append(f"{network:14}{precision:9}{layer!s:38}{choice:9}{text}  {others}")
    head = ["Predicted milliseconds, device/host by algorithm; nothing of it was measured.", ""]
    total = [
        f"{network:14}{precision:9}" + "".join(f"{key} {sums[network, precision, key]:9.2f} "
                                              for key in ("chosen", "best", "fused"))
        for network, precision, _ in dict.fromkeys((n, p, "") for n, p, _ in sums)
    ]  # fmt: skip
    publish([*head, *total, "", *lines], options.output / "roofline.txt")


if __name__ == "__main__":
    main()

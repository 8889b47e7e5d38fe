"""Where the time of a factor goes, against what no exact method can avoid.

One layer of each kind. The time of a call is split by torch's profiler into matrix products,
copies and writes, sums, and the rest. Beside it stand the products and the bytes that cannot be
avoided. The distance is the time as a multiple of the larger of the two.

    python benchmarks/factor_profile.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

import torch
from factor_bounds import rates, shares
from factor_contestants import OURS, ours
from factor_layers import HERE, layers
from timing import machine, seconds

from einconv_kfac.curvature.factors.choice import choose

KINDS = {
    "stride 1": "8x64x56x56 k3 s1 p1 d1 g1",
    "stride 1, wide": "8x512x7x7 k3 s1 p1 d1 g1",
    "stride 2": "8x128x28x28 k3 s2 p1 d1 g1",
    "first layer": "8x3x224x224 k7 s2 p3 d1 g1",
    "depthwise": "8x144x56x56 k3 s1 p1 d1 g144",
    "depthwise, 7x7": "8x512x14x14 k7 s1 p3 d1 g512",
    "1x1": "8x256x56x56 k1 s1 p0 d1 g1",
    "kernel = stride": "8x256x28x28 k2 s2 p0 d1 g1",
    "1d": "32x64x1024 k9 p4",
    "3d": "8x32x16x28x28 k3 p1",
    "transposed": "32x128x14x14 k4 s2 p1 transposed",
}


def report(kinds: dict[str, str], budget: float) -> Iterator[str]:
    """Yield one line per layer and approximation."""
    found = {str(layer): layer for layer in layers()}
    speed = rates(budget)
    yield str(speed)
    yield ""
    yield (
        f"{'':7} {'kind':16} {'layer':34} {'algorithm':12} {'ms':>8} {'products':>9} {'copies':>7} "
        f"{'sums':>5} {'rest':>5} {'MAC, least ms':>14} {'bytes, least ms':>16} {'distance':>9}"
    )
    for approximation, (kind, name) in product(("expand", "reduce"), kinds.items()):
        layer = found[name]
        x, call = torch.randn(layer.shape), ours(layer, approximation)
        spent = seconds({OURS: lambda x=x, call=call: call(x)}, budget)[OURS]  # type: ignore[misc]
        parts = shares(layer, approximation, 3)
        rest = 1 - sum(parts.values())
        bounds = speed.bounds(layer, approximation)
        chosen = approximation == "expand" and not layer.transposed
        yield (
            f"{approximation:7} {kind:16} {name:34} {choose(layer.problem) if chosen else '':12} "
            f"{1e3 * spent:8.2f} {parts['products']:9.0%} {parts['copies']:7.0%} "
            f"{parts['sums']:5.0%} {rest:5.0%} {1e3 * bounds[0]:14.2f} {1e3 * bounds[1]:16.2f} "
            f"{spent / max(bounds):9.1f}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, for a test")
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a layer")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "factor_profile.txt")
    options = parser.parse_args(arguments)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    lines = [machine(1)]
    print(lines[0])
    kinds = dict(list(KINDS.items())[2:3]) if options.quick else KINDS
    for line in report(kinds, 0.0 if options.quick else options.budget):
        print(line, flush=True)
        lines.append(line)
    torch.set_num_threads(threads)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

"""Time and memory of the input-based Kronecker factors of the layers of real networks.

Every distinct layer of conv_layers.json, at batch size 32 for the networks on images of up to
64 pixels and 8 for those on 224, and some layers in one and three dimensions and a transposed
one. The contestants take turns; times are medians. "Least" is the time of the products and bytes
that no exact method can avoid. Memory is the peak of the resident set in
a fresh process beyond input and result. Writes a table and a picture to benchmarks/results/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path

import torch
from factor_bounds import Rates, rates, shares
from factor_contestants import CONTESTANTS, OURS, ours
from factor_layers import HERE, Layer, layers
from factor_memory import MEASURED, memory
from factor_report import Row, draw, shortfalls, summary, table
from timing import machine, seconds

from einconv_kfac.curvature.factors.approximation import APPROXIMATIONS
from einconv_kfac.curvature.factors.choice import applicable, choose


def measure(
    layer: Layer, approximation: str, budget: float, speed: Rates, with_memory: bool = True
) -> Row:
    """Time the contestants and our algorithms on one layer."""
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    functions = {name: make(layer, approximation) for name, make in CONTESTANTS.items()}
    calls = {name: partial(f, x) for name, f in functions.items() if f is not None}
    reference = calls[OURS]()
    for call in calls.values():
        torch.testing.assert_close(call().reshape_as(reference), reference, rtol=1e-3, atol=1e-3)
    del reference
    times = seconds(calls, budget)
    algorithms: dict[str, float] = {}
    if approximation == "expand" and not layer.transposed:
        problem = layer.problem
        names = [name for name in applicable(problem) if name != choose(problem)]
        if problem.geometry.groups > 1:
            names = [name for name in names if name != "correlations"]  # far behind, and slow
        others = {name: partial(ours(layer, approximation, name), x) for name in names}
        algorithms = seconds({OURS: calls[OURS], **others}, budget / 2)
        algorithms = {name: t * times[OURS] / algorithms[OURS] for name, t in algorithms.items()}
    used = memory(layer, approximation) if with_memory else dict.fromkeys(MEASURED, float("nan"))
    bound = max(speed.bounds(layer, approximation))
    return Row(
        layer, approximation, times, used, algorithms, bound, shares(layer, approximation, 3)
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few small layers, for a test")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--budget", type=float, default=1.0, help="seconds for a layer")
    parser.add_argument("--approximation", choices=APPROXIMATIONS, help="both by default")
    parser.add_argument("--layers", default="", help="only those whose line holds this text")
    parser.add_argument("--skip-memory", action="store_true", help="measure times alone")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "factors.txt")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    chosen = [found for found in layers() if options.layers in f"{found.network} {found}"]
    if options.quick:
        chosen = sorted(chosen, key=lambda layer: prod(layer.shape) * layer.result_size)[:4]
    speed, rows = rates(options.budget), []
    for approximation in [options.approximation] if options.approximation else APPROXIMATIONS:
        for layer in chosen:
            row = measure(layer, approximation, options.budget, speed, not options.skip_memory)
            rows.append(row)
            print(*list(table(rows[-1:]))[2:3], flush=True)
    head = [machine(options.threads), str(speed), ""]
    text = [*head, *summary(rows), "", *table(rows), *shortfalls(rows)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(text) + "\n")
    draw(rows, options.output.with_suffix(".png"))
    print("\n".join(text[: text.index("", len(head))]))


if __name__ == "__main__":
    main()

"""How many operations of a factor torch divides over its threads, which wait at the end of each.

Products and weight gradients count always, other operations if they have more elements than torch
leaves to one thread. The last columns are the tasks into which a factor is divided on two and on
sixteen threads; there is then one wait for all of them, and one for each result that is added.
Nothing is timed, and nothing depends on the machine but the choice of the algorithm.

    python benchmarks/factor_regions.py
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from factor_contestants import ours
from factor_layers import HERE, Layer, layers
from factor_profile import KINDS
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from einconv_kfac.curvature.factors.choice import ALGORITHMS, applicable, choose
from einconv_kfac.curvature.factors.division import division_of

GRAIN_ELEMENTS = 32768
"""Elements up to which torch leaves an operation to one thread."""

PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "addbmm", "convolution", "_linear_pointwise")


class RegionCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operations that torch divides over its threads."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count an operation, and run it."""
        result = func(*args, **(kwargs or {}))
        name = func.name().partition("::")[2].partition(".")[0].rstrip("_")
        is_product = any(name.startswith(product) for product in PRODUCTS)
        sizes = [x.numel() for x in (*args, result) if isinstance(x, Tensor)]
        is_large = max(sizes, default=0) > GRAIN_ELEMENTS
        copies = not func.is_view and not name.startswith(("empty", "new_empty", "_unsafe_view"))
        self.count += is_product or (copies and is_large)
        return result


def regions(layer: Layer, algorithm: str | None) -> int:
    """Return the number of divided operations of a factor that is not divided itself."""
    x, call = torch.randn(layer.shape), ours(layer, "expand", algorithm)
    call(x)  # constants are computed once
    with RegionCount() as found:
        call(x)
    return int(found.count)


def report(names: Sequence[str]) -> Iterator[str]:
    """Yield a line for each algorithm of each layer."""
    found = {str(layer): layer for layer in layers()}
    yield f"{'layer':40} {'algorithm':13} divided operations   tasks on 2   tasks on 16"
    for name in names:
        layer = found[name]
        names_of = [None] if layer.transposed else applicable(layer.problem)
        for algorithm in names_of:
            if algorithm == "fused" or (algorithm == "correlations" and layer.groups > 1):
                continue  # not for processors, or far behind and slow
            counted = regions(layer, algorithm)
            tasks = ["", ""]
            if algorithm is not None:
                problems = [replace(layer.problem, threads=threads) for threads in (2, 16)]
                plans = [division_of(problem, ALGORITHMS[algorithm]) for problem in problems]
                tasks = [f"{plan.tasks or ''} {plan.kind}" for plan in plans]
            mark = "*" if algorithm is None or algorithm == choose(layer.problem) else ""
            yield f"{name:40} {(algorithm or '') + mark:13} {counted:18}   {tasks[0]:12} {tasks[1]}"
    yield ""
    yield "* chosen on one thread"


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one layer, for a test")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "factor_regions.txt")
    options = parser.parse_args(arguments)
    lines = []
    for line in report([KINDS["stride 2"]] if options.quick else list(KINDS.values())):
        print(line, flush=True)
        lines.append(line)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

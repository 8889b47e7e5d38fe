"""Factors with one thread and with several, beside im2col and beside another checkout.

Each checkout computes in a process of its own; the processes take turns, so that none runs while
another one does. Wall time counts, as a user waits; processor time says how much of it was spent
waiting for other threads in a loop. The load of the machine is printed, since it decides most.

    python benchmarks/factor_threads.py --threads 1 2
    python benchmarks/factor_threads.py --before path/to/another/checkout
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from factor_contestants import CONTESTANTS
from factor_layers import HERE, layers
from factor_profile import KINDS
from timing import machine, mean

Times = dict[tuple[str, int, str], list[tuple[float, float]]]


def serve() -> None:
    """Compute what the lines of the input say, and print wall and processor seconds of each."""
    found = {str(layer): layer for layer in layers()}
    warm: set[str] = set()
    for line in sys.stdin:
        name, threads, contestant = json.loads(line)
        torch.set_num_threads(threads)
        x = torch.randn(found[name].shape, generator=torch.Generator().manual_seed(0))
        call: Any = CONTESTANTS[contestant](found[name], "expand")
        if line not in warm:
            warm.add(line)
            call(x)
        start = time.perf_counter(), time.process_time()
        call(x)
        print(time.perf_counter() - start[0], time.process_time() - start[1], flush=True)


def started(checkout: Path) -> subprocess.Popen[str]:
    """Return a process that computes with the package of a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )


def measured(
    checkouts: dict[str, Path], names: list[str], threads: list[int], turns: int
) -> Iterator[Times]:
    """Yield seconds of wall and processor by layer, threads and contestant, after each turn."""
    running = {name: started(path) for name, path in checkouts.items()}
    contestants = [*((name, name, "ours") for name in checkouts), ("im2col", "ours", "im2col")]
    times: Times = {}
    for turn in range(turns):
        first = turn % len(contestants)
        for name, count in product(names, threads):
            for label, process, contestant in contestants[first:] + contestants[:first]:
                found = _answer(running[process], name, count, contestant)
                times.setdefault((name, count, label), []).append(found)
        yield times
    for child in running.values():
        child.communicate()


def _answer(
    child: subprocess.Popen[str], name: str, threads: int, contestant: str
) -> tuple[float, float]:
    """Return wall and processor seconds of one computation in a process."""
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(json.dumps([name, threads, contestant]) + "\n")
    child.stdin.flush()
    wall, processor = map(float, child.stdout.readline().split())
    return wall, processor


def table(times: Times, names: list[str], threads: list[int], labels: list[str]) -> Iterator[str]:
    """Yield the medians of milliseconds, and the geometric means of ratios to ours."""
    yield f"{'layer':40} threads " + " ".join(f"{label:>9} processor" for label in labels)
    middle = {
        key: tuple(1e3 * median(side) for side in zip(*found)) for key, found in times.items()
    }
    for name, count in product(names, threads):
        columns = (f"{middle[name, count, label][0]:9.2f} {middle[name, count, label][1]:9.2f}"
                   for label in labels)  # fmt: skip
        yield f"{name:40} {count:7} " + " ".join(columns)
    yield ""
    for count, label in product(threads, labels):
        ratios = [middle[n, count, label][0] / middle[n, count, "ours"][0] for n in names]
        single = [middle[n, threads[0], label][0] / middle[n, count, label][0] for n in names]
        yield (
            f"{count} thread(s), {label}: {mean(ratios):.2f} times ours; "
            f"{mean(single):.2f} times as fast as with {threads[0]}"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--serve", action="store_true", help="compute for another process")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--turns", type=int, default=9, help="how often each is measured")
    parser.add_argument("--before", type=Path, help="another checkout, to be measured as well")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--quick", action="store_true", help="one layer, for a test")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "factor_threads.txt")
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    names = [KINDS[kind] for kind in (["stride 2"] if options.quick else options.kinds)]
    checkouts = {"ours": HERE.parent, **({"before": options.before} if options.before else {})}
    load = os.getloadavg()[0]
    turns, labels = 1 if options.quick else options.turns, [*checkouts, "im2col"]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = []
    for times in measured(checkouts, names, options.threads, turns):
        loads = f"load {load:.1f} to {os.getloadavg()[0]:.1f}"
        lines = [machine(max(options.threads)), f"{os.cpu_count()} processors, {loads}", ""]
        lines += table(times, names, options.threads, labels)
        options.output.write_text("\n".join(lines) + "\n")  # after each turn, lest it be cut
    print("\n".join(lines))


if __name__ == "__main__":
    main()

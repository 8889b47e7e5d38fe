"""Compare KFAC on its defaults with SGD and AdamW at searched learning rates on the digits.

SGD has Nesterov momentum 0.9. The learning rates of SGD and AdamW come from a grid of seven, a
factor of two apart: the rate with the smallest sum of the median steps to both training losses,
over seeds that the comparison does not use. Prints tables and writes them to
benchmarks/results/digits.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from math import inf, isfinite
from pathlib import Path
from statistics import median

import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "examples"))

from train_digits import OPTIMIZERS, TARGETS, Run, Setting, split_digits, train

RESULTS = Path(__file__).resolve().parent / "results" / "digits.txt"
GRIDS = {
    "SGD": tuple(0.0125 * 2.0**i for i in range(7)),
    "AdamW": tuple(0.001 * 2.0**i for i in range(7)),
}
EPOCHS = {448: 30, 64: 15}  # by batch size


@dataclass(frozen=True)
class Protocol:
    """Optimizers, batch sizes and seeds of the search and of the comparison."""

    optimizers: tuple[str, ...] = OPTIMIZERS
    batch_sizes: tuple[int, ...] = (448, 64)
    seeds: tuple[int, ...] = tuple(range(10))
    search_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    grid_size: int = 7
    epochs: int | None = None


@dataclass
class Report:
    """Lines of the tables; each is printed when it is added."""

    lines: list[str] = field(default_factory=list)

    def add(self, line: str = "") -> None:
        """Print a line and keep it."""
        print(line, flush=True)
        self.lines.append(line)


def run(name: str, setting: Setting, seed: int) -> Run:
    """Train once; split, initial weights and batches depend on the seed."""
    return train(name, split_digits(seed), replace(setting, seed=seed), quiet=True)


def steps(runs: Sequence[Run], target: float) -> list[float]:
    """Return each run's number of steps to ``target``, infinity if it was not reached."""
    return [inf if (count := run.steps_to(target)) is None else count for run in runs]


def show(value: float, style: str = ".4g") -> str:
    """Format a number, or return a dash if it is infinite."""
    return format(value, style) if isfinite(value) else "-"


def search(name: str, setting: Setting, protocol: Protocol, report: Report) -> float:
    """Return the learning rate with the fewest steps, and report all rates of the grid."""
    scores = {}
    report.add(f"  {name:5} lr     steps to {TARGETS}, test loss; medians")
    for lr in GRIDS[name][: protocol.grid_size]:
        runs = [run(name, replace(setting, lr=lr), seed) for seed in protocol.search_seeds]
        counts = [median(steps(runs, target)) for target in TARGETS]
        scores[lr] = sum(counts)
        loss = median(done.test_loss for done in runs)
        report.add(f"        {lr:<7g}{' '.join(f'{show(c):>5}' for c in counts)}  {loss:.4f}")
    return min(scores, key=lambda lr: scores[lr])


def describe(name: str, runs: dict[int, Run]) -> list[str]:
    """Return the rows of one optimizer: medians over seeds, then each seed."""
    done = list(runs.values())
    columns = [steps(done, target) for target in TARGETS]
    columns.append([run.test_loss for run in done])
    columns.append([100 * run.test_accuracies[-1] for run in done])
    columns.append([1000 * run.times[-1] / len(run.losses) for run in done])
    rows = [("median", [median(column) for column in columns])]
    rows += [(f"seed {seed}", list(values)) for seed, values in zip(runs, zip(*columns))]
    return [
        f"  {name:8} {label:7}" + " ".join(f"{show(value):>10}" for value in values)
        for label, values in rows
    ]


def compare(batch_size: int, protocol: Protocol, report: Report) -> None:
    """Search learning rates and run all optimizers at one batch size."""
    epochs = protocol.epochs or EPOCHS.get(batch_size, Setting.epochs)
    setting = Setting(epochs=epochs, batch_size=batch_size)
    report.add(f"batch size {batch_size}, {epochs} epochs")
    rates = {
        name: search(name, setting, protocol, report)
        for name in protocol.optimizers
        if name in GRIDS
    }
    report.add(f"  chosen: {rates}")
    titles = [*(f"to {target}" for target in TARGETS), "test loss", "accuracy %", "ms/step"]
    report.add(" " * 18 + " ".join(f"{title:>10}" for title in titles))
    runs: dict[str, dict[int, Run]] = {name: {} for name in protocol.optimizers}
    for seed, name in product(protocol.seeds, protocol.optimizers):  # interleaved: fair timings
        runs[name][seed] = run(name, replace(setting, lr=rates.get(name)), seed)
    for name in protocol.optimizers:
        for line in describe(name, runs[name]):
            report.add(line)
    report.add()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison; print and write its tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smoke test: seconds, no meaning")
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=OPTIMIZERS)
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(arguments)
    protocol = Protocol(optimizers=tuple(args.optimizers))
    if args.quick:
        protocol = replace(protocol, seeds=(0,), search_seeds=(100,), grid_size=1, epochs=1)
    report = Report()
    report.add(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    for batch_size in protocol.batch_sizes:
        compare(batch_size, protocol, report)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text("\n".join(report.lines))


if __name__ == "__main__":
    main()

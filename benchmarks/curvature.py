"""Kronecker factors of real models: time and memory of this package and of other libraries.

The libraries take turns in one process. The table shows the median time of each, and its ratio to
that of this package. A library that cannot handle a model is listed with its error. Peak memory
counts tensors only, as torch's profiler reports them. On grouped convolutions curvlinops averages
the inputs over all groups, which is less work and gives another matrix.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from tables import RESULTS, command_line, heading, publish
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.interop.backpack import with_groups

Run = Callable[[], object]


@dataclass(frozen=True)
class Task:
    """A model and a batch of images."""

    name: str
    model: nn.Sequential
    x: Tensor
    y: Tensor


def _block(inputs: int, outputs: int, stride: int, groups: int = 1) -> list[nn.Module]:
    """Return a 3x3 convolution (depthwise and pointwise if grouped), and its activation."""
    if groups == 1:
        return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.ReLU()]
    depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False)
    return [depthwise, nn.ReLU(), nn.Conv2d(inputs, outputs, 1, bias=False), nn.ReLU()]


def tasks(small: bool) -> list[Task]:
    """Return a plain, a wide-kernel and a depthwise-separable network on 32x32 images."""
    torch.manual_seed(0)
    n, size, width = (4, 8, 8) if small else (32, 32, 64)
    head = [nn.AvgPool2d(size // 2), nn.Flatten()]
    plain = [*_block(3, width, 1), *_block(width, 2 * width, 2), *_block(2 * width, 2 * width, 1)]
    wide = [nn.Conv2d(3, width, 7, 1, 3), nn.ReLU(), nn.Conv2d(width, width, 5, 2, 2), nn.ReLU()]
    separable = [
        *_block(3, width, 1),
        *_block(width, 2 * width, 2, 2),
        *_block(2 * width, width, 1, 2),
    ]
    models = {
        "plain": nn.Sequential(*plain, *head, nn.Linear(2 * width, 10)),
        "wide kernels": nn.Sequential(*wide, *head, nn.Linear(width, 10)),
        "separable": nn.Sequential(*separable, *head, nn.Linear(width, 10)),
    }
    x, y = torch.randn(n, 3, size, size), torch.randint(10, (n,))
    return [Task(name, model, x, y) for name, model in models.items()]


def ours(task: Task) -> Run:
    """Monte-Carlo factors with one sample, expand."""
    loss_fn = nn.CrossEntropyLoss()
    return lambda: kronecker_factors(task.model, loss_fn, [(task.x, task.y)])


def curvlinops(task: Task) -> Run:
    """The same factors by curvlinops."""
    library = import_module("curvlinops")
    operator = library.KFACLinearOperator(
        task.model,
        nn.CrossEntropyLoss(),
        list(task.model.parameters()),
        [(task.x, task.y)],
        check_deterministic=False,
        separate_weight_and_bias=False,
        num_data=len(task.x),
        num_per_example_loss_terms=1,
    )

    def run() -> object:
        operator._input_covariances.clear()
        operator._gradient_covariances.clear()
        return operator.compute_kronecker_factors()

    return run


def backpack(task: Task, extend: Callable[[Any], Any] = lambda extension: extension) -> Run:
    """Factors of BackPACK's KFAC, whose ``B`` sums gradients over positions first."""
    library = import_module("backpack")
    model = library.extend(nn.Sequential(*task.model))
    loss_fn = library.extend(nn.CrossEntropyLoss())

    def run() -> object:
        extension = extend(library.extensions.KFAC(mc_samples=1))
        with library.backpack(extension):
            loss_fn(model(task.x), task.y).backward()
        model.zero_grad()
        return extension

    return run


def nngeometry(task: Task) -> Run:
    """Monte-Carlo factors of NNGeometry, from its own loader."""
    metrics, objects = import_module("nngeometry.metrics"), import_module("nngeometry.object")
    data = torch.utils.data.TensorDataset(task.x, task.y)
    loader = torch.utils.data.DataLoader(data, batch_size=len(data))
    return lambda: metrics.FIM_MonteCarlo(task.model, loader, objects.PMatKFAC)


LIBRARIES: dict[str, Callable[[Task], Run]] = {
    "einconv-kfac": ours,
    "curvlinops": curvlinops,
    "BackPACK": backpack,
    "NNGeometry": nngeometry,
    "BackPACK, ours for groups": lambda task: backpack(task, with_groups),
}


def peak(run: Run) -> float:
    """Return the largest growth of tensor memory during a run, in MB."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    held = largest = 0
    profiler: Any = found.profiler
    for event in sorted(profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            largest = max(largest, held)
    return largest / 1e6


def measure(task: Task, repeats: int) -> dict[str, tuple[float, float] | str]:
    """Return seconds and megabytes by library, or why it did not run."""
    runs: dict[str, Run] = {}
    results: dict[str, tuple[float, float] | str] = {}
    for name, build in LIBRARIES.items():
        try:
            runs[name] = build(task)
            runs[name]()  # warm up, and see whether the model is supported
        except (ImportError, NotImplementedError, RuntimeError, ValueError) as error:
            runs.pop(name, None)
            results[name] = str(error).splitlines()[0][:60]
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):  # interleaved, so that other load hits all alike
        for name, run in runs.items():
            start = perf_counter()
            run()
            times[name].append(perf_counter() - start)
    return {**results, **{n: (median(t), peak(runs[n])) for n, t in times.items()}}


def table(results: dict[str, dict[str, tuple[float, float] | str]]) -> list[str]:
    """Return the lines of the table, from the measurements of each model."""
    lines = [f"{'model':14}{'library':28}{'ms':>9}{'ratio':>8}{'peak MB':>10}"]
    for model, libraries in results.items():
        own = libraries["einconv-kfac"]
        for name in LIBRARIES:
            found = libraries[name]
            if isinstance(found, str) or isinstance(own, str):
                lines.append(f"{model:14}{name:28}  refused: {found}")
            else:
                numbers = f"{1e3 * found[0]:9.1f}{found[0] / own[0]:8.2f}{found[1]:10.1f}"
                lines.append(f"{model:14}{name:28}{numbers}")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, and write it to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--repeats", type=int, default=9, help="runs per library")
    add("--small", action="store_true", help="a smoke test: tiny models, nothing is written")
    add("--output", type=Path, default=RESULTS / "curvature.txt", help="file of the table")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    chosen = tasks(options.small)
    runs = f"medians of {options.repeats} interleaved runs"
    title = heading("float32", f"batch {len(chosen[0].x)}", runs)
    lines = [title, *table({task.name: measure(task, options.repeats) for task in chosen})]
    publish(lines, None if options.small else options.output)


if __name__ == "__main__":
    main()

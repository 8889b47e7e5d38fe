"""Steps to a training loss by batch size: KFAC on its defaults and peers with searched rates.

A batch is accumulated in micro-batches, as many workers would compute it together. The examples are
drawn anew for each step: images of digits, shifted at random, and Fashion-MNIST at half its size.
The loss is that of 2,048 fixed training examples, evaluated after every step, later every twentieth
of the steps so far. Rates are constant; the best one is searched on seed 0 for each batch size, by
factors of two until both neighbours are worse. The reported steps are medians over other seeds.

SOAP updates its preconditioner in every step, which takes the fewest steps. KFAC has no rate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib import import_module
from math import inf, isfinite, log2
from pathlib import Path
from statistics import median
from typing import Any

import torch
from evidence.data import DIRECTORY, at_size, fashion_mnist, synthetic
from evidence.examples import Examples
from evidence.optimizers import library
from tables import RESULTS, command_line, heading, publish
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from einconv_kfac.optim import KFAC

BATCHES = (64, 512, 2048, 8192)
SEARCH_SEED, SEEDS = 0, (1, 2, 3)
EVALUATED = 2048
_LONGER = 1.5
"""Steps at a batch size that are tried, by those that a smaller one took."""
_TRIES = 7
"""Rates of a search."""


@dataclass(frozen=True)
class Task:
    """A network, examples, and the loss to reach.

    Args:
        title: Title in the table.
        examples: Those to train on.
        draw: Changes the inputs of a batch at random.
        network: Returns a new network; the caller has set the seed.
        target: The loss to reach.
        limit: Most steps at the smallest batch size.
    """

    title: str
    examples: Examples
    draw: Callable[[Tensor, torch.Generator], Tensor]
    network: Callable[[], nn.Module]
    target: float
    limit: int


@dataclass(frozen=True)
class Peer:
    """An optimizer.

    Args:
        build: Makes it for a model, its loss and a rate.
        first: The rate that is tried first at the smallest batch size; ``None`` without a rate.
    """

    build: Callable[[nn.Module, nn.Module, float], Any]
    first: float | None


def _sgd(model: nn.Module, loss_fn: nn.Module, rate: float) -> Any:
    return torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True)


def _adamw(model: nn.Module, loss_fn: nn.Module, rate: float) -> Any:
    return torch.optim.AdamW(model.parameters(), lr=rate)


def _soap(model: nn.Module, loss_fn: nn.Module, rate: float) -> Any:
    soap = library("pytorch_optimizer").SOAP
    return soap(model.parameters(), lr=rate, precondition_frequency=1)


def _has_soap() -> bool:
    """Return whether SOAP is installed; if not, it is left out."""
    try:
        library("pytorch_optimizer")
    except ImportError as error:
        print(error)
        return False
    return True


def _kfac(model: nn.Module, loss_fn: nn.Module, rate: float) -> Any:
    return KFAC(model, loss_fn)


OPTIMIZERS = {
    "KFAC": Peer(_kfac, None),
    "SOAP": Peer(_soap, 2.0**-8),
    "AdamW": Peer(_adamw, 2.0**-8),
    "SGD": Peer(_sgd, 2.0**-4),
}


def shifted(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images, each moved by up to one pixel along both sides; zeros move in."""
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    size, moves = x.shape[-1], torch.randint(3, (2, len(x), 1), generator=generator)
    rows, columns = (moves[i] + torch.arange(size) for i in range(2))
    which = torch.arange(len(x))[:, None, None]
    return padded[which, 0, rows[:, :, None], columns[:, None, :]].unsqueeze(1)


def unchanged(x: Tensor, generator: torch.Generator) -> Tensor:
    """Return images as they are."""
    return x


def digits() -> Examples:
    """Return the images of digits ``[1797, 1, 8, 8]`` of scikit-learn."""
    pixels, classes = import_module("sklearn.datasets").load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    return Examples(x, torch.tensor(classes))


def perceptron() -> nn.Module:
    """Return a network of three linear layers for the digits."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def convolutional() -> nn.Module:
    """Return a network of two convolutions and two linear layers for 14x14 images."""
    convolutions = [nn.Conv2d(1, 8, 3, 2), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(
        *convolutions, nn.Flatten(), nn.Linear(144, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def tasks(directory: Path | None) -> list[Task]:
    """Return the tasks; without a folder of Fashion-MNIST with synthetic images in its place."""
    images = (synthetic() if directory is None else fashion_mnist(directory)).train
    found = [Task("digits, three linear layers", digits(), shifted, perceptron, 0.1, 8000)]
    small = at_size(images, 14)
    title = "Fashion-MNIST 14x14, two convolutions and two linear layers"
    return [*found, Task(title, small, unchanged, convolutional, 0.4, 8000)]


def drawn(task: Task, batch: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches of examples, shuffled in each epoch; a batch may begin the next one."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < batch:
            order = torch.cat([order, torch.randperm(len(task.examples), generator=generator)])
        now, order = order[:batch], order[batch:]
        yield task.draw(task.examples.x[now], generator), task.examples.y[now]


def steps_to_target(
    task: Task, peer: Peer, rate: float, batch: int, seed: int, limit: float, micro: int
) -> float:
    """Return the steps of a run to the target, infinity if more than a limit or if it diverges."""
    torch.manual_seed(seed)
    model, loss_fn = task.network(), nn.CrossEntropyLoss()
    opt = peer.build(model, loss_fn, rate)
    fixed = torch.Generator().manual_seed(1000)
    held = task.examples.first(EVALUATED)
    x = task.draw(held.x, fixed)
    data, step, due = drawn(task, batch, seed), 0, 1
    while step < limit:
        opt.zero_grad()
        inputs, classes = next(data)
        for part, target in zip(torch.split(inputs, micro), torch.split(classes, micro)):
            (loss_fn(model(part), target) * (len(part) / batch)).backward()
        opt.step()
        step += 1
        if step < due:
            continue
        due = step + max(1, step // 20)
        with torch.no_grad():
            loss = float(cross_entropy(model(x), held.y))
        if loss <= task.target:
            return step
        if not isfinite(loss):
            break
    return inf


def searched(run: Callable[[float, float], float], first: float, limit: float) -> float:
    """Return the rate with the fewest steps, by factors of two until both neighbours are worse.

    Args:
        run: Returns the steps at a rate, infinity above a limit.
        first: The rate that is tried first.
        limit: Most steps.
    """
    start = log2(first)
    found = {start: run(first, limit)}
    while len(found) < _TRIES:
        best = min(found, key=lambda power: found[power])
        near = (best + 1, best - 1) if isfinite(found[best]) else (max(found) + 1, min(found) - 1)
        missing = [power for power in near if power not in found]
        if not missing:
            break
        power = min(missing, key=lambda power: abs(power - start))
        found[power] = run(2.0**power, min(limit, found[best]))
    return float(2.0 ** min(found, key=lambda power: found[power]))


@dataclass(frozen=True)
class Row:
    """What an optimizer needs at a batch size.

    Args:
        batch: The batch size.
        rate: The rate; ``None`` without one.
        steps: The steps of each seed.
    """

    batch: int
    rate: float | None
    steps: Sequence[float]


def rows(
    task: Task, name: str, batches: Sequence[int], micro: int, seeds: Sequence[int] = SEEDS
) -> Iterator[Row]:
    """Yield the rows of an optimizer, from the smallest batch size."""
    peer, limit = OPTIMIZERS[name], float(task.limit)
    rate = peer.first
    for batch in batches:

        def run(rate: float, limit: float, batch: int = batch, seed: int = SEARCH_SEED) -> float:
            return steps_to_target(task, peer, rate, batch, seed, limit, micro)

        if rate is not None:
            rate = searched(run, rate, limit)
        steps = [run(rate or 0.0, 2 * limit, seed=seed) for seed in seeds]
        yield Row(batch, rate, steps)
        middle = median(steps)
        limit = min(limit, max(20.0, _LONGER * middle))


def table(task: Task, found: dict[str, list[Row]]) -> list[str]:
    """Return the lines of a task's table."""
    count = f"{len(task.examples)} images"
    lines = [f"{task.title}, {count}, steps to a training loss of {task.target:g}"]
    lines.append(f"{'batch':>8}" + "".join(f"{n:>8}{'range':>14}{'rate':>10}" for n in found))
    for own in zip(*found.values()):
        cells = [f"{own[0].batch:8}"]
        for row in own:
            span = f"{_count(min(row.steps))} to {_count(max(row.steps))}"
            rate = "-" if row.rate is None else f"{row.rate:.2g}"
            cells.append(f"{_count(median(row.steps)):>8}{span:>14}{rate:>10}")
        lines.append("".join(cells))
    for name, own_rows in found.items():
        first, last = own_rows[0], own_rows[-1]
        gain = median(first.steps) / median(last.steps)
        if isfinite(gain):
            times = last.batch // first.batch
            lines.append(f"  {name}: {gain:.1f} times fewer steps, batches {times} times as large")
    return lines


def _count(steps: float) -> str:
    """Return a number of steps, a dash for none."""
    return f"{steps:.0f}" if isfinite(steps) else "-"


def draw(found: dict[str, dict[str, list[Row]]], path: Path) -> None:
    """Draw the steps by batch size; dotted lines halve the steps where the batch is doubled."""
    figure = import_module("matplotlib.figure").Figure((10, 4), layout="constrained")
    for axis, (title, peers) in zip(figure.subplots(1, len(found)), found.items()):
        for name, own in peers.items():
            sizes, middle = [row.batch for row in own], [median(row.steps) for row in own]
            (line,) = axis.plot(sizes, middle, "o-", label=name)
            ideal = [middle[0] * sizes[0] / size for size in sizes]
            axis.plot(sizes, ideal, ":", color=line.get_color(), linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="batch size", ylabel="steps")
        axis.set_title(title.partition(",")[0])
        axis.set_ylim(bottom=1)
        axis.legend()
    figure.savefig(path, dpi=80)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables, and write them and a picture to the results."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--micro", type=int, default=1024, help="most examples of a micro-batch")
    add("--data-dir", type=Path, default=DIRECTORY, help="folder of the four .gz files")
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--quick", action="store_true", help="a smoke test: few steps, no meaning")
    add("--output", type=Path, default=RESULTS, help="folder of large_batch.txt and .png")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    batches: Sequence[int] = BATCHES
    seeds: Sequence[int] = SEEDS
    own = partial(tasks, options.data_dir)
    if options.quick:
        batches, seeds, own = (16, 32), (1,), partial(tasks, None)
    found: dict[str, dict[str, list[Row]]] = {}
    names = [name for name in options.optimizers if name != "SOAP" or _has_soap()]
    options.output.mkdir(parents=True, exist_ok=True)
    lines = [heading(f"medians of {len(seeds)} seeds", f"micro-batches of {options.micro}")]
    stem = "large_batch-quick" if options.quick else "large_batch"
    for given in own():
        task = replace(given, target=2.2, limit=10) if options.quick else given
        found[task.title] = {
            name: list(rows(task, name, batches, options.micro, seeds)) for name in names
        }
        lines += ["", *table(task, found[task.title])]
        (options.output / f"{stem}.txt").write_text("\n".join(lines))  # in case it is interrupted
    publish(lines, options.output / f"{stem}.txt")
    try:
        draw(found, options.output / f"{stem}.png")
    except ImportError:
        print("No picture: matplotlib is not installed.")


if __name__ == "__main__":
    main()

"""Train one small convolutional network on handwritten digits with KFAC, SGD and AdamW.

All optimizers start from the same weights and see the same batches. The script prints a table, and
saves a picture of the curves.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import fmean
from time import perf_counter

import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from tqdm import tqdm

from einconv_kfac import KFAC

OPTIMIZERS = ("KFAC", "SGD", "AdamW")
LEARNING_RATES = {"SGD": 0.2, "AdamW": 0.032}  # the best of a search: see benchmarks/digits.py
TARGETS = (0.1, 0.03)  # training losses to reach, as a running mean over one epoch's steps
TRAINING_IMAGES = 1347  # three quarters
COLUMNS = (
    ("test accuracy", "test_accuracy", ".2%"),
    ("test loss", "test_loss", ".4f"),
    ("steps to 0.1", "steps_to_0.1", "d"),
    ("s to 0.1", "seconds_to_0.1", ".2f"),
    ("steps to 0.03", "steps_to_0.03", "d"),
    ("s to 0.03", "seconds_to_0.03", ".2f"),
    ("s per step", "seconds_per_step", ".4f"),
)

Summary = dict[str, float | None]


@dataclass(frozen=True)
class Split:
    """Images ``[N, 1, 8, 8]`` in [0, 1] and their digits ``[N]``, for training and for testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class Setting:
    """How to train; a learning rate or damping of ``None`` is the optimizer's default."""

    epochs: int = 30
    batch_size: int = 448
    seed: int = 0
    lr: float | None = None
    damping: float | None = None


@dataclass
class Run:
    """Results of one training run; losses and times are per step."""

    steps_per_epoch: int
    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    test_accuracies: list[float] = field(default_factory=list)
    test_loss: float = float("nan")

    def running_mean(self) -> list[float]:
        """Return the mean loss of the latest epoch's worth of steps, from the first full one on."""
        window = self.steps_per_epoch
        ends = range(window, len(self.losses) + 1)
        return [fmean(self.losses[end - window : end]) for end in ends]

    def steps_to(self, target: float) -> int | None:
        """Return the number of steps until the running mean reaches ``target``, if it does."""
        means = enumerate(self.running_mean(), start=self.steps_per_epoch)
        return next((step for step, loss in means if loss <= target), None)

    def summary(self) -> Summary:
        """Return the numbers of the run's row in the table."""
        summary: Summary = {
            "test_accuracy": self.test_accuracies[-1],
            "test_loss": self.test_loss,
            "seconds": self.times[-1],
            "steps": len(self.losses),
            "seconds_per_step": self.times[-1] / len(self.losses),
        }
        for target in TARGETS:
            steps = self.steps_to(target)
            summary[f"steps_to_{target}"] = steps
            summary[f"seconds_to_{target}"] = None if steps is None else self.times[steps - 1]
        return summary


def split_digits(seed: int, device: str = "cpu") -> Split:
    """Load the images and split them at random, since they are ordered by writer."""
    pixels, digits = load_digits(return_X_y=True)
    x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    y = torch.tensor(digits)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    train, test = order[:TRAINING_IMAGES], order[TRAINING_IMAGES:]
    return Split(*(part.to(device) for part in (x[train], y[train], x[test], y[test])))


def build_network(seed: int) -> nn.Sequential:
    """Return the network: three convolutions, one strided and one grouped, and a linear head."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, padding=1, groups=4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )


def build_optimizer(name: str, model: nn.Module, loss_fn: nn.Module, setting: Setting) -> Optimizer:
    """Return the named optimizer, with its default hyper-parameters where the setting has none."""
    if name == "KFAC":
        lr = 1.0 if setting.lr is None else setting.lr
        return KFAC(model, loss_fn, lr=lr, damping=setting.damping)
    lr = LEARNING_RATES[name] if setting.lr is None else setting.lr
    if name == "SGD":
        return SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    return AdamW(model.parameters(), lr=lr)


def batches(data: Split, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield shuffled batches, epoch after epoch, without the last incomplete one of each."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(data.x), generator=generator).to(data.x.device)
        for indices in torch.split(order, batch_size)[: len(data.x) // batch_size]:
            yield data.x[indices], data.y[indices]


@torch.no_grad()
def evaluate(model: nn.Module, data: Split) -> tuple[float, float]:
    """Return loss and accuracy on the test images."""
    outputs = model(data.x_test)
    hits = (outputs.argmax(dim=1) == data.y_test).float()
    return nn.functional.cross_entropy(outputs, data.y_test).item(), hits.mean().item()


def train(name: str, data: Split, setting: Setting, quiet: bool = False) -> Run:
    """Train the network with one optimizer; evaluations are not part of the times."""
    model, loss_fn = build_network(setting.seed).to(data.x.device), nn.CrossEntropyLoss()
    optimizer = build_optimizer(name, model, loss_fn, setting)
    run = Run(steps_per_epoch=len(data.x) // setting.batch_size)
    stream = batches(data, setting.batch_size, setting.seed)
    with tqdm(total=setting.epochs * run.steps_per_epoch, desc=f"{name:5}", disable=quiet) as bar:
        for _ in range(setting.epochs):
            train_epoch(model, loss_fn, optimizer, stream, run)
            run.test_loss, accuracy = evaluate(model, data)
            run.test_accuracies.append(accuracy)
            bar.set_postfix(loss=f"{run.running_mean()[-1]:.4f}", accuracy=f"{accuracy:.1%}")
            bar.update(run.steps_per_epoch)
    return run


def train_epoch(
    model: nn.Module,
    loss_fn: nn.Module,
    optimizer: Optimizer,
    stream: Iterator[tuple[Tensor, Tensor]],
    run: Run,
) -> None:
    """Take one epoch's steps and append their losses and times to ``run``."""
    start = perf_counter() - (run.times[-1] if run.times else 0.0)
    for x, y in islice(stream, run.steps_per_epoch):
        optimizer.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        optimizer.step()
        run.losses.append(loss.item())
        run.times.append(perf_counter() - start)


def format_table(summaries: dict[str, Summary]) -> str:
    """Return the summaries as a table, one row per optimizer."""
    lines: list[str] = [" | ".join(("optimizer", *(title for title, _, _ in COLUMNS)))]
    for name, summary in summaries.items():
        cells = [name.ljust(len("optimizer"))]
        for title, key, style in COLUMNS:
            value = summary[key]
            text = "-" if value is None else format(value, style)
            cells.append(text.rjust(len(title)))
        lines.append(" | ".join(cells))
    return "\n".join(lines)


def draw_curves(runs: dict[str, Run], title: str, path: Path) -> None:
    """Save curves of training loss by step and by second, and of test accuracy by step."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    figure.suptitle(title)
    by_step, by_time, accuracy = figure.subplots(1, 3)
    for name, run in runs.items():
        means, first = run.running_mean(), run.steps_per_epoch
        steps = range(first, len(run.losses) + 1)
        by_step.semilogy(steps, means, label=name)
        by_time.semilogy(run.times[first - 1 :], means, label=name)
        accuracy.plot(steps[::first], run.test_accuracies, label=name)
    for axes, unit in ((by_step, "step"), (by_time, "seconds")):
        axes.set(xlabel=unit, ylabel="training loss (mean over one epoch)")
        for target in TARGETS:
            axes.axhline(target, color="grey", linewidth=0.8, linestyle=":")
            axes.annotate(f"{target}", (1, target), xycoords=("axes fraction", "data"), ha="right")
    accuracy.set(xlabel="step", ylabel="test accuracy", ylim=(0.8, 1.0))
    accuracy.legend(loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def optimizer_name(text: str) -> str:
    """Return an optimizer's name as it is spelled here; upper and lower case do not matter."""
    names = {name.lower(): name for name in OPTIMIZERS}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"must be one of {', '.join(OPTIMIZERS)}, got {text!r}")
    return names[text.lower()]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    names = " ".join(OPTIMIZERS)
    add(
        "--optimizers",
        nargs="+",
        type=optimizer_name,
        default=OPTIMIZERS,
        metavar="NAME",
        help=f"which to run, of: {names} (default: all)",
    )
    add(
        "--epochs",
        type=int,
        default=Setting.epochs,
        help="passes over the training images (default: %(default)s)",
    )
    add(
        "--batch-size",
        type=int,
        default=Setting.batch_size,
        help="images per step (default: %(default)s)",
    )
    add("--lr", type=float, help="learning rate of every optimizer that runs (default: its own)")
    add("--damping", type=float, help="damping of KFAC, held fixed (default: adapted)")
    add(
        "--seed",
        type=int,
        default=Setting.seed,
        help="seed of the split, the initial weights and the batches (default: %(default)s)",
    )
    add("--device", default="cpu", help="torch device to train on (default: %(default)s)")
    add(
        "--output",
        type=Path,
        default=Path("digits.png"),
        help="picture of the curves to write (default: %(default)s)",
    )
    add("--json", type=Path, metavar="FILE", help="file for the numbers of the table")
    args = parser.parse_args(arguments)
    if args.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {args.epochs}")
    if not 1 <= args.batch_size <= TRAINING_IMAGES:
        parser.error(f"--batch-size must be in 1..{TRAINING_IMAGES}, got {args.batch_size}")
    return args


def main(arguments: Sequence[str] | None = None) -> None:
    """Train with every optimizer; print the table, and save curves and numbers."""
    args = parse_arguments(arguments)
    data = split_digits(args.seed, args.device)
    print(f"{len(data.x)} training and {len(data.x_test)} test images, split by seed {args.seed}")
    setting = Setting(args.epochs, args.batch_size, args.seed, args.lr, args.damping)
    runs = {name: train(name, data, setting) for name in args.optimizers}
    summaries = {name: run.summary() for name, run in runs.items()}
    print(format_table(summaries))
    draw_curves(runs, f"Handwritten digits, batches of {args.batch_size} images", args.output)
    print(f"curves: {args.output.resolve()}")
    if args.json is not None:
        args.json.write_text(json.dumps(summaries, indent=2) + "\n")


if __name__ == "__main__":
    main()

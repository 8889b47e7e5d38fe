"""One run of one optimizer, and the file of all runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from math import inf, isfinite
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import nn

from evidence.data import Images, Split
from evidence.optimizers import OPTIMIZERS, schedule
from evidence.tasks import Task, batches

EVALUATED = 2000
"""Training images on which the loss of every run is evaluated."""
_CHUNK = 500
_DIVERGED = 20.0  # times the first loss


@dataclass(frozen=True)
class Run:
    """One training run and its results.

    Args:
        size: The size of the tasks.
        task: The task's letter.
        optimizer: The optimizer's name.
        seed: The seed of weights and batches; that of trials is 0.
        setting: The optimizer's hyper-parameters.
        total: Steps of the whole run.
        steps: The steps after which it was evaluated.
        losses: Loss on the same 2,000 training images, after these steps.
        seconds: Wall-clock time of these steps without that of evaluations.
        cpu_seconds: The same in processor time.
        accuracies: Accuracy on the test images after half of the run and at its end.
        error: The exception that ended the run early, if there was one.
    """

    size: str
    task: str
    optimizer: str
    seed: int
    setting: dict[str, Any]
    total: int
    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def key(self) -> str:
        """Return a text that identifies the run; results are no part of it."""
        setting = json.dumps(self.setting, sort_keys=True)
        parts = (self.size, self.task, self.optimizer, self.seed, self.total, setting)
        return "|".join(map(str, parts))

    @property
    def final(self) -> float:
        """Return the last loss, or infinity if the run ended early."""
        if self.error or not self.losses or not isfinite(self.losses[-1]):
            return inf
        return self.losses[-1]

    def first_below(self, target: float) -> int | None:
        """Return the index of the first evaluation with at most the loss ``target``."""
        return next((i for i, loss in enumerate(self.losses) if loss <= target), None)


@torch.no_grad()
def mean_loss(task: Task, model: nn.Module, images: Images) -> float:
    """Return the loss in evaluation mode."""
    model.eval()
    total = 0.0
    for x, y in _chunks(images):
        total += float(task.loss(task.loss_fn(), model(x), x, y)) * len(x)
    model.train()
    return total / len(images)


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the fraction of correctly classified images, in evaluation mode."""
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in _chunks(images))
    model.train()
    return right / len(images)


def _chunks(images: Images) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield images and classes in chunks."""
    yield from zip(torch.split(images.x, _CHUNK), torch.split(images.y, _CHUNK))


def train(task: Task, split: Split, run: Run) -> Run:
    """Train, and return the run with its results; an exception becomes its ``error``."""
    done = replace(run, steps=[], losses=[], seconds=[], cpu_seconds=[], accuracies=[])
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _train(task, split, done)
    except (ArithmeticError, ImportError, NotImplementedError, RuntimeError, ValueError) as error:
        return replace(done, error=f"{type(error).__name__}: {str(error).splitlines()[0][:200]}")
    return done


def _train(task: Task, split: Split, run: Run) -> None:
    """Train, and append the results to the lists of the run."""
    torch.manual_seed(run.seed)
    model = task.model()
    trainer = OPTIMIZERS[run.optimizer](model, task, run.setting)
    data, held = split.train, split.train.first(EVALUATED)
    indices = batches(task, len(data), run.seed)
    wall = cpu = 0.0
    start_loss = mean_loss(task, model, held)
    for step in range(run.total):
        chosen = indices(step)
        x, y = data.x[chosen], data.y[chosen]
        wall_start, cpu_start = perf_counter(), process_time()
        trainer.step(x, y, schedule(step, run.total))
        wall, cpu = wall + perf_counter() - wall_start, cpu + process_time() - cpu_start
        if task.due(step + 1):
            loss = mean_loss(task, model, held)
            if not loss < _DIVERGED * start_loss:
                raise ArithmeticError(f"the loss was {loss:.4g} after {step + 1} steps.")
            run.steps.append(step + 1)
            run.losses.append(loss)
            run.seconds.append(wall)
            run.cpu_seconds.append(cpu)
        if not task.autoencoder and step + 1 in (run.total // 2, run.total):
            run.accuracies.append(accuracy(model, split.test))


class Records:
    """A file of runs, one JSON object per line, to which finished runs are appended."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._runs: dict[str, Run] = {}
        if path.is_file():
            for line in path.read_text().splitlines():
                run = Run(**_numbers(json.loads(line)))
                self._runs[run.key] = run

    def find(self, run: Run) -> Run | None:
        """Return the finished run of this key."""
        return self._runs.get(run.key)

    def add(self, run: Run) -> None:
        """Store a finished run, and append it to the file."""
        self._runs[run.key] = run
        self._path.parent.mkdir(parents=True, exist_ok=True)
        rounded = {k: _rounded(v) for k, v in asdict(run).items()}
        with self._path.open("a") as file:
            file.write(json.dumps(rounded) + "\n")


def _rounded(value: object) -> object:
    """Round the numbers of a list to six digits."""
    if isinstance(value, list):
        return [float(f"{v:.6g}") if isinstance(v, float) else v for v in value]
    return value


def _numbers(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a run; files written by later versions may have more."""
    return {name: fields[name] for name in Run.__dataclass_fields__ if name in fields}

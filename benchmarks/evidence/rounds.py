"""Training runs that take turns, so that other load on the machine affects all alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import datetime, timezone
from math import inf
from pathlib import Path
from platform import machine, processor
from time import perf_counter, process_time

import torch

from evidence.examples import Split
from evidence.optimizers import OPTIMIZERS, schedule
from evidence.runs import Run
from evidence.task import Task, batches, mean_loss, measured

_DIVERGED = 20.0  # times the first loss, in the second half of a run


def train(task: Task, split: Split, runs: Sequence[Run]) -> list[Run]:
    """Train, and return the runs with their results; an exception becomes a run's ``error``.

    The runs take turns: each trains until its next evaluation. Every run has random numbers of its
    own, so that it is the same as alone.
    """
    clock = f"{datetime.now(timezone.utc):%Y-%m-%dT%H:%M:%S.%f}"
    courses = [_Course(task, split, run, clock) for run in runs]
    going = list(courses)
    while going:
        going = [course for course in going if course.advance()]
    return [course.run for course in courses]


class _Course:
    """One run on its way.

    Args:
        task: The task.
        split: Its examples.
        run: The run, untrained.
        clock: Name of the clock, see `Run`.
    """

    def __init__(self, task: Task, split: Split, run: Run, clock: str) -> None:
        fresh = replace(run, steps=[], losses=[], seconds=[], cpu_seconds=[], metrics=[])
        self.run = replace(fresh, machine=processor_name(), clock=clock)
        self._stages = _stages(task, split, self.run)
        self._random: torch.Tensor | None = None

    def advance(self) -> bool:
        """Train until the next evaluation, and return whether the run goes on."""
        before = torch.get_rng_state()
        if self._random is not None:
            torch.set_rng_state(self._random)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return next(self._stages, None) is not None
        except (ArithmeticError, ImportError, NotImplementedError, RuntimeError, ValueError) as e:
            reason = f"{type(e).__name__}: {str(e).splitlines()[0][:200]}"
            self.run = replace(self.run, error=reason)
            return False
        finally:
            self._random = torch.get_rng_state()
            torch.set_rng_state(before)


def _stages(task: Task, split: Split, run: Run) -> Iterator[int]:
    """Train, and append the results to the lists of the run; yield after every evaluation."""
    torch.manual_seed(run.seed)
    model = task.model()
    trainer = OPTIMIZERS[run.optimizer](model, task, run.setting)
    data, held = split.train, split.train.first(task.family.evaluated)
    indices = batches(task, len(data), run.seed)
    wall = cpu = 0.0
    start_loss = mean_loss(task, model, held)
    for step in range(run.total):
        chosen = indices(step)
        x, y = data.x[chosen], data.y[chosen]
        wall_start, cpu_start = perf_counter(), process_time()
        trainer.step(x, y, schedule(step, run.total))
        wall, cpu = wall + perf_counter() - wall_start, cpu + process_time() - cpu_start
        if task.family.metric and step + 1 in (run.total // 2, run.total):
            run.metrics.append(measured(task, model, split.test))
        if task.due(step + 1):
            loss = mean_loss(task, model, held)
            largest = _DIVERGED * start_loss if step >= run.total // 2 else inf
            if not loss < largest:
                raise ArithmeticError(f"the loss was {loss:.4g} after {step + 1} steps.")
            run.steps.append(step + 1)
            run.losses.append(loss)
            run.seconds.append(wall)
            run.cpu_seconds.append(cpu)
            yield step + 1


def processor_name() -> str:
    """Return the processor's model, or its kind where the system does not say more."""
    lines = Path("/proc/cpuinfo")
    if lines.is_file():
        for line in lines.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return processor() or machine()

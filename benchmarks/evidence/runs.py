"""One run of one optimizer, and the file of all runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import inf, isfinite
from pathlib import Path
from typing import Any

_FORMER = {"accuracies": "metrics"}
"""Names of fields in older files."""


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
        losses: Loss on the same training examples, after these steps.
        seconds: Wall-clock time of these steps without that of evaluations.
        cpu_seconds: The same in processor time.
        metrics: Result of the task's test after half of the run and at its end.
        error: The exception that ended the run early, if there was one.
        machine: The processor.
        clock: Runs with the same text took turns in one process. Only their seconds are compared.
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
    metrics: list[float] = field(default_factory=list)
    error: str = ""
    machine: str = ""
    clock: str = ""

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


class Records:
    """A file of runs, one JSON object per line, to which finished runs are appended.

    Of several runs with one key the last one counts.
    """

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
    named = {_FORMER.get(name, name): value for name, value in fields.items()}
    return {name: named[name] for name in Run.__dataclass_fields__ if name in named}

"""Train on thirteen tasks with KFAC on its defaults and with tuned peers, in steps and in seconds.

Each peer gets the same number of trials (seed 0), a linear warm-up over 5 % of the run and a cosine
to zero; the setting with the smallest final training loss then runs on other seeds. KFAC's
defaults have no schedule. The training loss is that on the same training examples (2,000 images,
256 texts) in evaluation mode; evaluations are not part of the times. Finished runs are appended to
a file of JSON lines and repeated only on demand, so an interrupted comparison can be continued.
Table and picture are made from it.

The missing runs of a seed take turns in one process. Only seconds of such runs are compared:

    python training.py --repeat KFAC                 # steps and losses of a new version
    python training.py --repeat KFAC,SOAP,AdamW      # times as well
    python training.py --held-out                    # seeds that are kept for the end
    python training.py --recorded                    # table and picture of what is on record
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evidence.data import DIRECTORY, Sources
from evidence.examples import Split
from evidence.optimizers import OPTIMIZERS
from evidence.picture import draw
from evidence.report import Outcome, table
from evidence.rounds import train
from evidence.runs import Records, Run
from evidence.search import settings
from evidence.task import Task
from evidence.tasks import TASKS, tasks
from tables import RESULTS, command_line, heading

SEEDS = (1, 2, 3)
HELD_OUT = (11, 12, 13)
"""Seeds that are kept for the end."""
_PROBED = 16  # steps; the second half of them gives the estimated time of a run


@dataclass(frozen=True)
class Protocol:
    """Tasks, optimizers and seeds of a comparison.

    Args:
        size: The size of the tasks.
        tasks: The tasks.
        optimizers: Names of optimizers.
        seeds: Seeds of the runs that count.
        trials: Trials per optimizer, all on seed 0.
        repeated: Optimizers whose runs that count are trained though they are on record.
        trains: Whether missing runs are trained; without them they are left out.
    """

    size: str
    tasks: Sequence[Task]
    optimizers: Sequence[str]
    seeds: Sequence[int]
    trials: int
    repeated: Sequence[str] = ()
    trains: bool = True

    def trial(self, task: Task, optimizer: str) -> list[Run]:
        """Return the trials of an optimizer, untrained; none if it has a single setting."""
        tried = settings(optimizer, task, self.trials)
        if len(tried) == 1:
            return []
        return [self.run(task, optimizer, 0, setting) for setting in tried]

    def run(self, task: Task, optimizer: str, seed: int, setting: dict[str, Any]) -> Run:
        """Return an untrained run."""
        return Run(self.size, task.name, optimizer, seed, setting, task.steps)


class Comparison:
    """Trains the runs of a protocol that are not on record.

    Args:
        protocol: Tasks, optimizers and seeds.
        sources: Where images come from.
        records: The finished runs.
    """

    def __init__(self, protocol: Protocol, sources: Sources, records: Records) -> None:
        self._protocol = protocol
        self._sources = sources
        self._records = records
        self._data: dict[str, Split] = {}

    def finished(self, task: Task, runs: Sequence[Run], repeated: Sequence[str] = ()) -> list[Run]:
        """Return the finished runs, training those that are not on record, in turns."""
        known = [None if r.optimizer in repeated else self._records.find(r) for r in runs]
        missing = [run for run, found in zip(runs, known) if found is None]
        trained = missing and self._protocol.trains
        for run in train(task, self._examples(task), missing) if trained else ():
            self._records.add(run)
            print(
                f"({run.task}) {run.optimizer}, seed {run.seed}, {run.setting}: "
                f"{run.error or f'{run.final:.5g} in {run.cpu_seconds[-1]:.1f} s'}",
                flush=True,
            )
        return [found for run in runs if (found := self._records.find(run)) is not None]

    def outcome(self, task: Task) -> Outcome:
        """Run all optimizers on a task, seed by seed."""
        chosen: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for name in self._protocol.optimizers:
            tried = self._protocol.trial(task, name)
            trials = [found for run in tried for found in self.finished(task, [run])]
            if trials and all(run.error for run in trials):
                failures[name] = trials[0].error
            elif trials or not tried:
                chosen[name] = min(trials, key=lambda run: run.final).setting if trials else {}
        runs: dict[str, list[Run]] = {name: [] for name in chosen}
        for seed in self._protocol.seeds:
            of_seed = [self._protocol.run(task, name, seed, chosen[name]) for name in chosen]
            for run in self.finished(task, of_seed, self._protocol.repeated):
                runs[run.optimizer].append(run)
        return Outcome(task, runs, failures)

    def plan(self) -> Iterator[str]:
        """Yield the estimated minutes of the missing runs, from a few steps of each optimizer."""
        total = 0.0
        for task in self._protocol.tasks:
            minutes = sum(self._minutes(task, name) for name in self._protocol.optimizers)
            total += minutes
            yield f"({task.name}) {task.title}: {minutes:.1f} minutes"
        yield f"together {total:.1f} minutes"

    def _minutes(self, task: Task, optimizer: str) -> float:
        """Return the estimated minutes of an optimizer on a task, evaluations excluded."""
        protocol = self._protocol
        setting = settings(optimizer, task, protocol.trials)[0]
        missing = sum(not self._records.find(run) for run in protocol.trial(task, optimizer))
        missing += len(protocol.seeds)
        short = replace(task, steps=_PROBED, evaluations=2)
        [done] = train(short, self._examples(task), [protocol.run(short, optimizer, 0, setting)])
        if done.error:
            return 0.0
        half = done.seconds[1] - done.seconds[0]
        return missing * task.steps * half / (_PROBED // 2) / 60

    def _examples(self, task: Task) -> Split:
        """Return a task's examples."""
        if task.name not in self._data:
            self._data = {task.name: task.family.data(self._sources)}
        return self._data[task.name]


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--data-dir", type=Path, default=DIRECTORY, help="folder of the four .gz files")
    add("--task", default=",".join(TASKS), help="letters, separated by commas")
    add("--optimizer", default=",".join(OPTIMIZERS), help="names, separated by commas")
    add("--seeds", default=",".join(map(str, SEEDS)), help="seeds of the runs that count")
    add("--held-out", action="store_true", help=f"seeds {HELD_OUT} in their place")
    add("--recorded", action="store_true", help="train nothing, and leave out missing runs")
    add("--repeat", default="", help="optimizers that are trained again on the seeds that count")
    add("--steps", type=int, help="steps of every run")
    add("--fraction", type=float, default=1.0, help="fraction of the steps of every run")
    add("--trials", type=int, default=5, help="trials per optimizer")
    add(
        "--quick",
        action="store_true",
        help="a smoke test: tiny networks and synthetic images, no meaning",
    )
    add("--full", action="store_true", help="full-size networks and runs; needs hours")
    add("--plan", action="store_true", help="only estimate the time")
    add("--output", type=Path, default=RESULTS, help="folder of training.jsonl, .txt and .png")
    return parser.parse_args(arguments)


def _chosen(given: str, known: Sequence[str], what: str) -> list[str]:
    """Return the names in a comma-separated list.

    Raises:
        SystemExit: If a name is unknown.
    """
    names = given.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"`--{what}` must be of {', '.join(known)}, got {name!r}.")
    return names


def _protocol(options: argparse.Namespace) -> Protocol:
    """Return the protocol that the command line describes."""
    size = "quick" if options.quick else "full" if options.full else "standard"
    known = tasks(size)
    chosen = [known[name] for name in _chosen(options.task, list(known), "task")]
    if options.steps is not None:
        chosen = [replace(task, steps=options.steps) for task in chosen]
    chosen = [replace(t, steps=round(options.fraction * t.steps)) for t in chosen]
    optimizers = _chosen(options.optimizer, list(OPTIMIZERS), "optimizer")
    trains = not options.recorded
    repeated = _chosen(options.repeat, optimizers, "repeat") if options.repeat else []
    seeds = HELD_OUT if options.held_out else tuple(map(int, options.seeds.split(",")))
    if options.quick:
        return Protocol(size, chosen, optimizers, (1,), 2, repeated, trains)
    return Protocol(size, chosen, optimizers, seeds, options.trials, repeated, trains)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the comparison, and write table and picture."""
    options = _arguments(arguments)
    protocol = _protocol(options)
    stem = "training-quick" if options.quick else "training"
    records = Records(options.output / f"{stem}.jsonl")
    sources = Sources(None if options.quick else options.data_dir)
    comparison = Comparison(protocol, sources, records)
    try:
        if options.plan:
            for line in comparison.plan():
                print(line, flush=True)
            return
        outcomes = []
        for task in protocol.tasks:
            outcomes.append(comparison.outcome(task))
            lines = [_heading(protocol), "", *table(outcomes)]
            (options.output / f"{stem}.txt").write_text("\n".join(lines))
    except FileNotFoundError as error:
        raise SystemExit(str(error)) from error
    print("\n".join(lines))
    try:
        draw(outcomes, options.output / f"{stem}.png")
    except ImportError:
        print("No picture: matplotlib is not installed.")


def _heading(protocol: Protocol) -> str:
    """Return machine, versions and protocol in a line."""
    trials = f"{protocol.trials} trials (seed 0), seeds {protocol.seeds}"
    return heading(f"{protocol.size} tasks", trials)


if __name__ == "__main__":
    main()

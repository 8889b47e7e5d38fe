"""The table and the picture of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from math import inf, isfinite
from pathlib import Path
from statistics import mean
from typing import Any

from evidence.optimizers import PEERS
from evidence.runs import Run
from evidence.tasks import Task

OWN = "KFAC"


@dataclass(frozen=True)
class Outcome:
    """The runs of one task.

    Args:
        task: The task.
        runs: By optimizer, the runs with the chosen setting, one per seed.
        failures: By optimizer, the error of its first trial if all trials failed.
    """

    task: Task
    runs: dict[str, list[Run]]
    failures: dict[str, str]

    def final(self, optimizer: str) -> float:
        """Return the mean over seeds of the final training loss."""
        return mean(run.final for run in self.runs[optimizer])

    @property
    def best_peer(self) -> str | None:
        """Return the peer with the smallest final training loss."""
        peers = [name for name in PEERS if self.runs.get(name) and isfinite(self.final(name))]
        return min(peers, key=self.final) if peers else None


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the lines of the table."""
    lines: list[str] = []
    for outcome in outcomes:
        peer = outcome.best_peer
        target = outcome.final(peer) if peer else inf
        task = outcome.task
        lines += [
            f"({task.name}) {task.title}: batch {task.batch_size}, {task.steps} steps, "
            f"{task.image_size}x{task.image_size}, {task.train_size} images",
            f"    target: {target:.4f}, the final training loss of {peer}"
            if peer
            else "    no peer",
            f"    {'':12}{'loss':>9}{'steps to':>10}{'seconds':>9}{'cpu s':>8}{'ms/step':>9}"
            f"{'test %':>8}{'at half':>8}   per seed: loss, steps, seconds; setting",
        ]
        lines += [_row(name, runs, target) for name, runs in outcome.runs.items() if runs]
        lines += [f"    {name:12} failed: {why}" for name, why in outcome.failures.items()]
        if peer and outcome.runs.get(OWN):
            lines.append(_ratios(outcome, peer, target))
        lines.append("")
    return lines


def _row(name: str, runs: Sequence[Run], target: float) -> str:
    """Return the line of one optimizer: means over seeds, then each seed."""
    reached = [_reached(run, target) for run in runs]
    means = [mean(column) for column in zip(*reached)]
    per_step = mean(1000 * r.cpu_seconds[-1] / r.steps[-1] if r.steps else inf for r in runs)
    accuracies = [r.accuracies for r in runs if len(r.accuracies) == 2]
    halves, ends = zip(*accuracies) if accuracies else ((inf,), (inf,))
    seeds = "; ".join(
        f"{r.final:.4f} {_show(s[0], 'd')} {_show(s[1], '.2f')}" for r, s in zip(runs, reached)
    )
    setting = " ".join(f"{k}={v}" for k, v in runs[0].setting.items()) or "defaults"
    return (
        f"    {name:12}{_show(mean(r.final for r in runs), '.4f'):>9}{_show(means[0], '.0f'):>10}"
        f"{_show(means[1], '.2f'):>9}{_show(means[2], '.2f'):>8}{_show(per_step, '.1f'):>9}"
        f"{_show(100 * mean(ends), '.2f'):>8}{_show(100 * mean(halves), '.2f'):>8}"
        f"   {seeds}; {setting}"
    )


def _reached(run: Run, target: float) -> tuple[float, float, float]:
    """Return steps, seconds and processor seconds to the target, infinity if it was not met."""
    index = run.first_below(target)
    if index is None:
        return inf, inf, inf
    return run.steps[index], run.seconds[index], run.cpu_seconds[index]


def _show(value: float, style: str) -> str:
    """Format a number, or return a dash if it is infinite."""
    if not isfinite(value):
        return "-"
    return format(int(value) if style == "d" else value, style)


def _ratios(outcome: Outcome, peer: str, target: float) -> str:
    """Return KFAC's steps and seconds to the target, divided by those of the peer's whole run."""
    own = [mean(column) for column in zip(*(_reached(r, target) for r in outcome.runs[OWN]))]
    rivals = outcome.runs[peer]
    whole = (
        mean(r.total for r in rivals),
        mean(r.seconds[-1] for r in rivals),
        mean(r.cpu_seconds[-1] for r in rivals),
    )
    steps, seconds, cpu = (_show(a / b, ".2f") for a, b in zip(own, whole))
    line = f"    KFAC by {peer}: {steps} of its steps, {seconds} of its time ({cpu} processor)"
    tuned = outcome.runs.get("KFAC tuned")
    if tuned and isfinite(best := min(outcome.final("KFAC tuned"), outcome.final(OWN))):
        line += f"; loss by the best tuned K-FAC's: {_show(outcome.final(OWN) / best, '.3f')}"
    return line


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the training loss by step and by processor second, one curve per seed.

    Raises:
        ImportError: If matplotlib is missing.
    """
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    plt = import_module("matplotlib.pyplot")
    figure, axes = plt.subplots(
        len(outcomes), 2, figsize=(10, 3 * len(outcomes)), squeeze=False, layout="constrained"
    )
    for outcome, (by_step, by_second) in zip(outcomes, axes):
        _curves(outcome, by_step, "steps")
        _curves(outcome, by_second, "cpu_seconds")
        by_step.set_ylabel("training loss")
        by_step.set_title(f"({outcome.task.name}) {outcome.task.title}")
    axes[0][0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def _curves(outcome: Outcome, axis: Any, clock: str) -> None:
    """Draw the losses of one task, by steps or by seconds."""
    for color, (name, runs) in enumerate(outcome.runs.items()):
        for index, run in enumerate(runs):
            label = name if index == 0 else None
            axis.plot(getattr(run, clock), run.losses, color=f"C{color}", label=label, lw=1)
    axis.set_yscale("log")
    axis.set_xlabel(clock.replace("cpu_seconds", "seconds of the processor"))

"""The table of finished runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from statistics import mean

from evidence.optimizers import PEERS
from evidence.runs import Run
from evidence.task import Task

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
            f"{task.family.description}",
            f"    target: {_loss(target)}, the final training loss of {peer}"
            if peer
            else "    no peer",
            f"    {'':12}{'loss':>10}{'steps to':>10}{'seconds':>9}{'cpu s':>8}{'ms/step':>9}"
            f"{task.family.metric:>11}{'at half':>11}   per seed: loss, steps, cpu s; setting",
        ]
        lines += [_row(task, name, runs, target) for name, runs in outcome.runs.items() if runs]
        lines += [f"    {name:12} failed: {why}" for name, why in outcome.failures.items()]
        if peer and outcome.runs.get(OWN):
            lines.append(_ratios(outcome, peer, target))
        lines.append("")
    return lines


def _row(task: Task, name: str, runs: Sequence[Run], target: float) -> str:
    """Return the line of one optimizer: means over seeds, then each seed."""
    reached = [_reached(run, target) for run in runs]
    means = [mean(column) for column in zip(*reached)]
    per_step = mean(1000 * r.cpu_seconds[-1] / r.steps[-1] if r.steps else inf for r in runs)
    tests = [r.metrics for r in runs if len(r.metrics) == 2]
    halves, ends = zip(*tests) if tests else ((inf,), (inf,))
    seeds = "; ".join(
        f"{_loss(r.final)} {_show(s[0], 'd')} {_show(s[2], '.2f')}" for r, s in zip(runs, reached)
    )
    setting = " ".join(f"{k}={v}" for k, v in runs[0].setting.items()) or "defaults"
    scale = task.family.scale
    return (
        f"    {name:12}{_loss(mean(r.final for r in runs)):>10}{_show(means[0], '.0f'):>10}"
        f"{_show(means[1], '.2f'):>9}{_show(means[2], '.2f'):>8}{_show(per_step, '.1f'):>9}"
        f"{_show(scale * mean(ends), '.4g'):>11}{_show(scale * mean(halves), '.4g'):>11}"
        f"   {seeds}; {setting}"
    )


def _reached(run: Run, target: float) -> tuple[float, float, float]:
    """Return steps, seconds and processor seconds to the target, infinity if it was not met."""
    index = run.first_below(target)
    if index is None:
        return inf, inf, inf
    return run.steps[index], run.seconds[index], run.cpu_seconds[index]


def _loss(value: float) -> str:
    """Format a loss to four decimals, a small one to four digits."""
    return _show(value, ".4f" if abs(value) >= 0.1 else ".4g")


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
    line = f"    KFAC by {peer}: {steps} of its steps, "
    if comparable(outcome.runs[OWN], rivals):
        line += f"{seconds} of its time ({cpu} processor)"
    else:
        line += "times are from different clocks"
    tuned = outcome.runs.get("KFAC tuned")
    if tuned and isfinite(best := min(outcome.final("KFAC tuned"), outcome.final(OWN))):
        line += f"; loss by the best tuned K-FAC's: {_show(outcome.final(OWN) / best, '.3f')}"
    return line


def comparable(first: Sequence[Run], second: Sequence[Run]) -> bool:
    """Return whether the runs of each seed took turns on one machine; older files do not say."""
    return all((a.machine, a.clock) == (b.machine, b.clock) for a, b in zip(first, second))

"""The picture of finished runs: medians and ranges over seeds."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from evidence.optimizers import OPTIMIZERS
from evidence.report import OWN, Outcome
from evidence.runs import Run

_COLORS = {name: f"C{index}" for index, name in enumerate(OPTIMIZERS)}
_PANELS = 4  # per row: two tasks, each by steps and by seconds


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Draw the training loss by step and by processor second.

    A line is the median over seeds, a band reaches from the smallest to the largest loss. Seconds
    are medians.

    Raises:
        ImportError: If matplotlib is missing.
    """
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    plt = import_module("matplotlib.pyplot")
    rows = -(-2 * len(outcomes) // _PANELS)
    size = (4 * _PANELS, 3 * rows)
    figure, axes = plt.subplots(rows, _PANELS, figsize=size, squeeze=False, layout="constrained")
    panels = list(axes.flat)
    for index, outcome in enumerate(outcomes):
        by_step, by_second = panels[2 * index : 2 * index + 2]
        _curves(outcome, by_step, "steps")
        _curves(outcome, by_second, "cpu_seconds")
        by_step.set_ylabel("training loss")
        by_step.set_title(f"({outcome.task.name}) {outcome.task.title}")
    for panel in panels[2 * len(outcomes) :]:
        panel.set_axis_off()
    handles = {label: h for p in panels for h, label in zip(*p.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=len(handles))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _curves(outcome: Outcome, axis: Any, clock: str) -> None:
    """Draw the losses of one task, by steps or by seconds."""
    for name, runs in outcome.runs.items():
        if not runs:
            continue
        times, lowest, middle, highest = bands(runs, clock)
        width = 2 if name == OWN else 1
        axis.plot(times, middle, color=_COLORS[name], label=name, lw=width)
        axis.fill_between(times, lowest, highest, color=_COLORS[name], alpha=0.2, lw=0)
    axis.set_yscale("log")
    axis.set_xlabel(clock.replace("cpu_seconds", "seconds of the processor"))


def bands(runs: Sequence[Run], clock: str) -> tuple[list[float], ...]:
    """Return times, and the smallest, median and largest losses, at common evaluations."""
    losses = [*zip(*(run.losses for run in runs))]
    times = zip(*(getattr(run, clock) for run in runs))
    return (
        [median(each) for each in times],
        [min(each) for each in losses],
        [median(each) for each in losses],
        [max(each) for each in losses],
    )

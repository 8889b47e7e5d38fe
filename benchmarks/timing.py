"""Times of contestants that take turns, and what they were taken on."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import torch


def seconds(calls: Mapping[str, Callable[[], Any]], budget: float) -> dict[str, float]:
    """Return the median time of each call; they take turns until the budget is spent.

    Each round starts with another call, so that none always finds the caches as the same other
    one leaves them. On one thread a time is that of the process, which other processes on the
    machine disturb least.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    names, turns = list(calls), 0
    times: dict[str, list[float]] = {name: [] for name in names}
    for call in calls.values():
        call()
    begin = time.perf_counter()
    while turns < 3 or (time.perf_counter() < begin + budget and turns < 101):
        first = turns % len(names)
        turns += 1
        for name in names[first:] + names[:first]:
            start = clock()
            calls[name]()
            times[name].append(clock() - start)
    return {name: median(found) for name, found in times.items()}


def mean(values: Sequence[float]) -> float:
    """Return the geometric mean."""
    return exp(sum(map(log, values)) / len(values)) if values else float("nan")


def machine(threads: int) -> str:
    """Return what the times were taken on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model} ({capability}), {threads} thread(s), {versions}"

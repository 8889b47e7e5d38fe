"""Times of contestants that take turns, and the machine on which they were measured."""

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
    """Return the median time of each call in seconds; the calls take turns until the budget ends.

    Each round starts with another call, so that no call always runs with the caches that the same
    other call has filled. On one thread processor time is measured, which other processes on the
    machine disturb least.

    Args:
        calls: The calls, by name.
        budget: Seconds for all of them; each is called at least three times.
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
    """Return processor, number of threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if "model name" in line), "unknown")
    capability = torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{model} ({capability}), {threads} thread(s), {versions}"

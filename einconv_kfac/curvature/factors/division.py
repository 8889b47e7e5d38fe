"""The division of a factor into tasks that run at the same time, each on one thread.

Groups are independent. Examples are summed: each task but the first has a result of its own,
which is added at the end, in the order of the tasks. Some algorithms divide products in a way of
their own: by pairs of blocks of channels, or by lags. The cheapest division is taken, by the
prices of the device; with one thread there is none.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

from torch import Tensor

from einconv_kfac.curvature.devices.threads import Task, run_tasks
from einconv_kfac.curvature.factors.algorithms.algorithm import Algorithm
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.allocation import new_matrices
from einconv_kfac.curvature.factors.symmetric.update import Update

UNDIVIDED, GROUPS, EXAMPLES, OWN = "undivided", "groups", "examples", "own"

INPUTS_PER_RESULTS = 1
"""Elements of the input per element of the results that tasks over examples add."""

OWN_PHASES = 4
"""About how often tasks wait for each other in an algorithm's own division."""


@dataclass(frozen=True)
class Division:
    """A way to divide a problem into tasks.

    Args:
        kind: What is divided.
        tasks: Number of tasks at the same time; of an undivided problem, 0 if it is computed by
            the thread that asks for it, with torch's own division of each operation.
        seconds: An estimate of its time, to be compared with others of the same problem only.
    """

    kind: str
    tasks: int
    seconds: float


@dataclass(frozen=True)
class Part:
    """A task: the problem of some of the groups, or of some examples."""

    problem: Problem
    start: int
    stop: int


@lru_cache(maxsize=4096)
def division_of(problem: Problem, algorithm: Algorithm) -> Division:
    """Return the cheapest division of a problem for an algorithm."""
    return min(_divisions(problem, algorithm), key=lambda found: found.seconds)


def _divisions(problem: Problem, algorithm: Algorithm) -> Iterator[Division]:
    """Yield the divisions of a problem."""
    cost, prices, threads = algorithm.cost(problem), problem.profile.prices, problem.threads
    work = cost.work_seconds(problem)
    if threads == 1:
        yield Division(UNDIVIDED, 0, work + prices.call * cost.calls)
        return
    calls = prices.call * cost.calls
    waits = prices.region * (cost.calls if cost.waits is None else cost.waits)
    speed = 1 + problem.profile.shared_operation_gain * (algorithm.sharing(problem) - 1)
    yield Division(UNDIVIDED, 0, work / speed + calls + waits)
    yield Division(UNDIVIDED, 1, work + calls)
    for tasks in {1 << i for i in range(1, threads.bit_length())} | {threads}:
        for kind in _kinds(problem, algorithm, tasks):
            yield Division(kind, tasks, _seconds(problem, algorithm, kind, tasks))


def _kinds(problem: Problem, algorithm: Algorithm, tasks: int) -> Iterator[str]:
    """Yield what may be divided into a number of tasks."""
    if problem.geometry.groups >= tasks:
        yield GROUPS
    results = (tasks - 1) * problem.outputs
    if problem.batch >= tasks and results * INPUTS_PER_RESULTS <= problem.inputs:
        yield EXAMPLES
    if len(algorithm.shares(problem, tasks)) > 1:
        yield OWN


def _seconds(problem: Problem, algorithm: Algorithm, kind: str, tasks: int) -> float:
    """Estimate the time of a division: that of the longest task, and what tasks share.

    One thread prepares all operations, and one at a time starts one.
    """
    profile, prices = problem.profile, problem.profile.prices
    part = parts(problem, kind, tasks)[0].problem
    cost = algorithm.cost(part)
    work, calls = cost.work_seconds(part), cost.calls
    if kind == OWN:  # the cost of all tasks
        longest = _longest(algorithm.shares(problem, tasks), tasks)
        work, calls = work * longest, calls * longest
    added = (tasks - 1) * problem.outputs if kind == EXAMPLES else 0
    waits = 1 + profile.python_share * (tasks - 1)
    total = work + prices.call * calls * waits + prices.copied * added
    return total + prices.task * tasks * (OWN_PHASES if kind == OWN else 1)


def _longest(shares: list[float], threads: int) -> float:
    """Return the part of the work of the thread that has most, if the largest shares go first."""
    work = [0.0] * threads
    for share in sorted(shares, reverse=True):
        work[work.index(min(work))] += share
    return max(work)


@lru_cache(maxsize=4096)
def parts(problem: Problem, kind: str, tasks: int) -> tuple[Part, ...]:
    """Return the tasks of a division; the first is the largest, or is all blocks of channels."""
    alone = replace(problem, threads=1, tasks=tasks)
    if kind == UNDIVIDED:
        return (Part(replace(problem, threads=1), 0, problem.batch),)
    if kind == OWN:
        return (Part(replace(alone, shares=tasks), 0, problem.batch),)
    total = problem.geometry.groups if kind == GROUPS else problem.batch
    bounds = [-(-total * i // tasks) for i in range(tasks + 1)]
    sizes = (stop - start for start, stop in pairwise(bounds))
    found = (
        replace(alone, geometry=replace(problem.geometry, groups=size))
        if kind == GROUPS
        else replace(alone, batch=size)
        for size in sizes
    )
    return tuple(map(Part, found, bounds, bounds[1:]))


def add_divided(algorithm: Algorithm, x: Tensor, problem: Problem, update: Update) -> None:
    """Add ``sum_{n,o} a a^T`` to an update, at the same time on several threads.

    Args:
        algorithm: The algorithm of each task.
        x: Input of shape ``[n, c, *i]``.
        problem: The problem that ``x`` and the convolution pose, with the number of threads.
        update: The update of ``[g, D, D]`` with the problem's groups and size.
    """
    found = division_of(problem, algorithm)
    if not found.tasks:
        algorithm.add(x, problem, update)
        return
    own = parts(problem, found.kind, found.tasks)
    if found.kind == EXAMPLES:
        _add_examples_(algorithm, x, own, update)
        return
    if found.kind == GROUPS:
        c = problem.channels
        tasks: list[Task] = [
            algorithm.task(
                x[:, part.start * c : part.stop * c],
                part.problem,
                replace(update, out=update.out[part.start : part.stop]),
            )
            for part in own
        ]
        run_tasks(tasks, problem.threads)
        return
    for phase in algorithm.phases(x, own[0].problem, update):
        run_tasks(phase, problem.threads)


def _add_examples_(algorithm: Algorithm, x: Tensor, own: tuple[Part, ...], update: Update) -> None:
    """Add the sums over some of the examples each, in the order of the tasks."""
    shape, dtype = (*update.out.shape,), update.out.dtype
    others = [new_matrices(update.out, shape, dtype) for _ in own[1:]]
    updates = [update, *(Update(out, 0.0, update.alpha) for out in others)]
    tasks: list[Task] = [
        algorithm.task(x[part.start : part.stop], part.problem, target)
        for part, target in zip(own, updates)
    ]
    run_tasks(tasks, own[0].problem.tasks)
    for other in others:
        update.out.add_(other)

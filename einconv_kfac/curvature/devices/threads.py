"""Tasks at the same time, each on one thread.

torch divides each operation over its threads, which wait for each other at its end. A factor has
hundreds of small operations. Beside other processes, a thread often has no processor when the
others wait for it. So a factor is divided into a few tasks, in which torch does not divide
operations, and there is one wait for all of them. They run on torch's own threads, or, where these
cannot be had or start late, on others.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from threading import Barrier, Lock, Thread

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.device_registry import profile_of
from einconv_kfac.curvature.devices.thread_team import torch_team

Task = Callable[[], None]


def threads_for(x: Tensor) -> int:
    """Return how many tasks on a tensor may run at the same time: torch's number of threads.

    It is 1 on other devices than the host, for subclasses of tensors, and where torch transforms
    or records what this thread computes: another thread's operations would escape.
    """
    plain = type(x) is Tensor and profile_of(x.device.type).is_host
    if not plain or torch.compiler.is_compiling() or _is_observed():
        return 1
    return torch.get_num_threads()


def _is_observed() -> bool:
    """Return whether modes or transforms of this thread would miss operations of others."""
    own = torch._C
    modes = own._len_torch_dispatch_stack() + own._len_torch_function_stack()
    return modes > 0 or own._are_functorch_transforms_active() or own._is_tracing()


def run_tasks(tasks: Sequence[Task], threads: int) -> None:
    """Run tasks, and return when all have ended.

    Each thread starts with the first task that has not been started. Tasks have no derivatives,
    and must neither read nor write what another one writes. The first error is raised.

    Args:
        tasks: The tasks, the longest first.
        threads: How many run at the same time; with 1, this thread runs them.
    """
    if threads == 1:
        for task in tasks:
            task()
        return
    waiting, inference = deque(tasks), torch.is_inference_mode_enabled()
    run = partial(_run, waiting, inference=inference)
    team = torch_team() if threads == torch.get_num_threads() else None
    if team is not None and len(tasks) == 1:
        team.run_undivided(run)
    elif team is not None and team.is_ready():
        team.run(run)
    else:
        _run_in_pool(run, waiting, threads)


def _run_in_pool(run: Task, waiting: deque[Task], threads: int) -> None:
    """Run tasks on threads of ours; ``run`` runs those that wait."""
    pool = _POOLS[threads]
    runs = [pool.submit(run) for _ in range(min(threads, len(waiting)))]
    try:
        wait(runs)
    finally:  # no task writes to tensors of a call that was interrupted
        waiting.clear()
        wait(runs)
    for own in runs:
        own.result()


def _run(waiting: deque[Task], *, inference: bool) -> None:
    """Run tasks on this thread until none is left."""
    with torch.inference_mode(inference), torch.no_grad():
        while waiting:
            try:
                task = waiting.popleft()
            except IndexError:  # another thread was faster
                return
            task()


class _Pools:
    """Threads on which torch does not divide operations, by their number; started on first use."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._pools: dict[int, ThreadPoolExecutor] = {}

    def __getitem__(self, threads: int) -> ThreadPoolExecutor:
        with self._lock:
            if threads not in self._pools:
                starter = Thread(target=self._start, args=(threads,))
                starter.start()
                starter.join()
            return self._pools[threads]

    def forget(self) -> None:
        """Forget the threads of a parent process, which a forked one does not have."""
        self._lock = Lock()
        self._pools.clear()

    def _start(self, threads: int) -> None:
        """Start a pool, from a thread of its own.

        `torch.set_num_threads` counts for the thread that calls it, and for threads that start
        later. So the number for the latter is read here, before it changes, and set again.
        """
        later = torch.get_num_threads()
        pool, started = ThreadPoolExecutor(threads, "einconv-kfac"), Barrier(threads)
        for _ in range(threads):
            pool.submit(_begin, started)
        pool.submit(int).result()  # a thread is free when all have begun
        torch.set_num_threads(later)
        self._pools[threads] = pool


def _begin(started: Barrier) -> None:
    """Compute on one thread from now on, and wait for the other threads of the pool."""
    torch.get_num_threads()  # the first call on a thread sets the number for later threads
    torch.set_num_threads(1)
    started.wait()


_POOLS = _Pools()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_POOLS.forget)

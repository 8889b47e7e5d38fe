"""The threads among which torch divides its operations, as a team for tasks.

After an operation they watch for the next one for some milliseconds, and keep their processors. So
they start at once, where threads of another kind would have to share processors with them. torch
has no call for this. Its threads are those of an OpenMP library, of which the entry point for
parallel regions of compiled programs, ``GOMP_parallel``, takes any function.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

LATE = 1e-3
"""Seconds after which a thread starts late: it slept, or another process had its processor."""
LEFT_OUT = 20
"""Calls that go without a team of which a thread was late."""
_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_LIBRARY = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"


class ThreadTeam:
    """Calls a function on each of torch's threads, at the same time.

    Raises:
        OSError: If torch's library is elsewhere.
        AttributeError: If torch's threads have no such entry point.
    """

    def __init__(self) -> None:
        self._call = _symbol("GOMP_parallel")
        self._call.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        self._call.restype = None
        self._set_threads = _symbol("omp_set_num_threads")
        try:
            self._set_mkl_threads = _symbol("MKL_Set_Num_Threads_Local")
        except AttributeError:  # torch computes without MKL
            self._set_mkl_threads = lambda _: 0
        self._left_out = 0

    def is_ready(self) -> bool:
        """Return whether all threads are likely to start at once.

        A call ends when each thread has taken part. Beside other processes that is later than
        among threads that share tasks, where none waits for one that comes late.
        """
        self._left_out -= self._left_out > 0
        return not self._left_out

    def run(self, function: Callable[[], None]) -> None:
        """Call a function on each thread, and return when all calls have ended.

        Operations in it are not divided. The first error is raised.

        Args:
            function: The function.
        """
        errors: list[BaseException] = []
        start = perf_counter()

        def region(_: object) -> None:
            if perf_counter() - start > LATE:
                self._left_out = LEFT_OUT
            try:
                self.run_undivided(function)
            except BaseException as error:  # raised below, on the thread of the caller
                errors.append(error)

        self._call(_REGION(region), None, torch.get_num_threads(), 0)
        if errors:
            raise errors[0]

    def run_undivided(self, function: Callable[[], None]) -> None:
        """Call a function on this thread alone, with operations that are not divided.

        Args:
            function: The function.
        """
        threads = torch.get_num_threads()  # the first call on a thread sets the numbers below
        mkl_threads = self._set_mkl_threads(1)
        self._set_threads(1)
        try:
            function()
        finally:
            self._set_threads(threads)
            self._set_mkl_threads(mkl_threads)


def _symbol(name: str) -> Any:
    """Return a function as torch's library finds it: libraries that all share come first."""
    try:
        return getattr(ctypes.CDLL(None), name)
    except AttributeError:
        return getattr(ctypes.CDLL(str(_LIBRARY)), name)


@cache
def _found_team() -> ThreadTeam | None:
    """Return torch's threads, if they take functions, in which torch divides no operation."""
    if "backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    threads: list[int] = []
    try:
        team = ThreadTeam()
        team.run(lambda: threads.append(torch.get_num_threads()))
    except (OSError, AttributeError, TypeError):
        return None
    return team if threads == [1] * torch.get_num_threads() else None


def torch_team() -> ThreadTeam | None:
    """Return torch's threads, of which there are several, or ``None`` if they take no functions.

    A forked process has none of them, and must not wait for them.
    """
    return None if _FORKED else _found_team()


_FORKED: list[bool] = []
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=partial(_FORKED.append, True))

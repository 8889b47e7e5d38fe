"""Processes that run functions as workers, all forked from one that has imported torch."""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from torch import distributed

TIMEOUT = timedelta(minutes=15)
"""How long a worker waits for another."""
WARM_UP = "worker_training", "warm_up"
OLDEST_THRESHOLD = 50
"""Collections of the middle generation before one of the oldest, in which caches of torch stay."""
DONE, CRASHED = "done\n", "crashed\n"
CRASHES = signal.SIGABRT, signal.SIGSEGV
"""Signals that end a process whose memory compiled code has corrupted."""


def run_workers(function: str, *sizes: int) -> dict[int, list[Any]]:
    """What a function returns on each worker, by the number of workers.

    Args:
        function: ``module.function``, called with rank and number of workers; 1 stands for a
            process without a process group.
        sizes: The numbers of workers.

    All run once more if one has crashed: one of fifty runs of divided models ended with
    "malloc(): unaligned tcache chunk detected".
    """
    found, is_complete = _run_once(function, sizes)
    return found if is_complete else _run_once(function, sizes)[0]


def _run_once(function: str, sizes: Sequence[int]) -> tuple[dict[int, list[Any]], bool]:
    """What a function returns on each worker, and whether none crashed."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(entry).resolve()) for entry in sys.path if entry]
        answer = _asked(_parent(), [function, folder, sizes, paths])
        found = {
            size: [_loaded(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)]
            for size in sizes
        }
    return found, answer == DONE


@cache
def _parent() -> subprocess.Popen[str]:
    """The process that forks all workers of a session of tests.

    It starts no threads, since on a CPU alone torch's backward pass runs in the thread that calls
    it. What it has imported and cached, its children have.
    """
    command = [sys.executable, __file__]
    pipe = subprocess.PIPE
    parent = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    atexit.register(_close, parent)
    return parent


def _asked(parent: subprocess.Popen[str], request: Sequence[Any]) -> str:
    """Send a request, and return the answer."""
    assert parent.stdin is not None
    assert parent.stdout is not None
    parent.stdin.write(json.dumps(request) + "\n")
    parent.stdin.flush()
    if not (answer := parent.stdout.readline()):
        raise RuntimeError(f"The parent of the workers must live, got {parent.wait()}.")
    return answer


def _close(parent: subprocess.Popen[str]) -> None:
    """End the process."""
    assert parent.stdin is not None
    parent.stdin.close()
    parent.wait()


def _loaded(path: Path) -> Any:
    """What a worker saved; ``None`` if it was killed."""
    return torch.load(path, weights_only=False) if path.exists() else None


def _work(function: str, folder: str, rank: int, size: int) -> None:
    """Run a function as one worker, and save what it returns."""
    module, _, name = function.rpartition(".")
    if size > 1:
        store, timeout = distributed.FileStore(f"{folder}/store-{size}", size), TIMEOUT
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timeout
        )
    result = getattr(importlib.import_module(module), name)(rank, size)
    path = Path(folder) / f"{size}-{rank}.pt"
    torch.save(result, f"{path}.part")
    os.replace(f"{path}.part", path)


def _forked(function: str, folder: str, rank: int, size: int) -> int:
    """Fork a worker, and return its process."""
    if child := os.fork():
        return child
    code = 1
    try:
        os.dup2(2, 1)  # the pipe is the parent's
        _work(function, folder, rank, size)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _ended(children: Sequence[int]) -> bool:
    """Wait for processes, kill those that a signal has stopped, and return whether one crashed."""
    statuses = {own: os.waitpid(own, os.WUNTRACED)[1] for own in children}
    for child in (own for own, status in statuses.items() if os.WIFSTOPPED(status)):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return any(os.WIFSIGNALED(s) and os.WTERMSIG(s) in CRASHES for s in statuses.values())


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Fork workers for each request, and wait for them; the first one trains a little before."""
    torch.set_num_threads(1)
    gc.set_threshold(*gc.get_threshold()[:2], OLDEST_THRESHOLD)
    is_warm = False
    for line in requests:
        function, folder, sizes, paths = json.loads(line)
        sys.path[:] = paths
        importlib.import_module(function.rpartition(".")[0])
        if not is_warm:
            module, name = WARM_UP
            getattr(importlib.import_module(module), name)()
            is_warm = True
        gc.collect()
        gc.freeze()  # what children only read
        children = [_forked(function, folder, rank, size) for size in sizes for rank in range(size)]
        answers.write(CRASHED if _ended(children) else DONE)
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)

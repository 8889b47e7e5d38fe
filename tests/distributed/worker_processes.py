"""Processes that run functions as workers, all forked from one that has imported torch."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tempfile
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed

TIMEOUT_SECONDS = 900


def run_workers(
    function: str, *sizes: int, timeout: float = TIMEOUT_SECONDS
) -> dict[int, list[Any]]:
    """What a function returns on each worker, by the number of workers.

    Args:
        function: ``module.function``, called with rank and number of workers; 1 stands for a
            process without a process group.
        sizes: The numbers of workers.
        timeout: Seconds that a worker waits for another.
    """
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(entry).resolve() for entry in sys.path if entry]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        command = [sys.executable, __file__, function, folder, str(timeout), *map(str, sizes)]
        subprocess.run(command, check=True, env=environment)
        return {
            size: [_loaded(Path(folder) / f"{size}-{rank}.pt") for rank in range(size)]
            for size in sizes
        }


def _loaded(path: Path) -> Any:
    """What a worker saved; ``None`` if it was killed."""
    return torch.load(path, weights_only=False) if path.exists() else None


def _work(function: str, folder: str, timeout: float, rank: int, size: int) -> None:
    """Run a function as one worker, and save what it returns."""
    torch.set_num_threads(1)
    module, _, name = function.rpartition(".")
    if size > 1:
        store = distributed.FileStore(f"{folder}/store-{size}", size)
        distributed.init_process_group(
            "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
        )
    result = getattr(importlib.import_module(module), name)(rank, size)
    path = Path(folder) / f"{size}-{rank}.pt"
    torch.save(result, f"{path}.part")
    os.replace(f"{path}.part", path)


def _main(function: str, folder: str, timeout: str, *sizes: str) -> None:
    """Fork the workers, and wait for them."""
    importlib.import_module(function.rpartition(".")[0])
    children = []
    for size in map(int, sizes):
        for rank in range(size):
            if (child := os.fork()) == 0:
                code = 1
                try:
                    _work(function, folder, float(timeout), rank, size)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    sys.stderr.flush()
                    os._exit(code)
            children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    _main(*sys.argv[1:])

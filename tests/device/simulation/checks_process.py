"""A process that has the simulated device, and forks one for each file of checks.

So torch, with the compiler that its optimizers import, the package, the plugins of pytest and the
files themselves are imported once, and no training of one file reaches another. Nothing is trained
before: a backward pass starts threads, and a process that has them cannot fork.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from pathlib import Path
from typing import IO

import pytest
import simulated_device as device
import torch
import torch._dynamo
import torch.distributed.fsdp

import einconv_kfac.optim
from einconv_kfac.optim.inverses import cholesky, eigen, ekfac

IMPORTED = torch._dynamo, torch.distributed.fsdp, einconv_kfac.optim, cholesky, eigen, ekfac
"""What every file would import."""
CHECKS = Path(__file__).parents[1] / "checks"
OPTIONS = ["-q", "-p", "no:cacheprovider", "-o", "addopts=", "-o", "python_files=check_*.py"]
"""Options of pytest for a file of checks."""


def _forked(file: str, output: str) -> int:
    """Run a file's checks in a process of its own, and return its exit status.

    Args:
        file: The file.
        output: Where to write what it prints.
    """
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    code = 1
    try:
        target = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        code = pytest.main([*OPTIONS, file])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _serve(requests: IO[str], answers: IO[str]) -> None:
    """Run a file for each request, and answer with its exit status."""
    with device.simulated():  # what torch imports with its first operator
        device.to_device(torch.zeros(1)).add(1)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for answers
        pytest.main([*OPTIONS, "-q", "--collect-only", str(CHECKS)])
    gc.collect()
    gc.freeze()  # what children only read
    for line in requests:
        file, output = line.rstrip("\n").split("\t")
        answers.write(f"{_forked(file, output)}\n")
        answers.flush()


if __name__ == "__main__":
    _serve(sys.stdin, sys.stdout)

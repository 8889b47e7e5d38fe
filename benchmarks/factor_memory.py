"""Peak memory of the ways to compute a factor, each in a process of its own.

Processes are forked from a server that has imported torch and computed nothing. The peak
is that of the resident set beyond what there was before the call. It is that of the second
call, after all free memory has been handed back: in the first one, code that is read from
libraries and what they reserve for themselves, some ten megabytes, count as well.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

import torch
from factor_contestants import CONTESTANTS, OURS
from factor_layers import Layer
from torch import Tensor

MEASURED = (OURS, "im2col")


def _status(name: str) -> float:
    """Return an entry of the process' status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def peak(call: Callable[[], Tensor]) -> float:
    """Return the peak of the resident set during the call, in bytes beyond what there was."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def copies(layer: Layer, approximation: str, name: str) -> float:
    """Return the peak beyond input and result in copies of the input, in this process."""
    torch.set_num_threads(1)
    x = torch.randn(layer.shape, generator=torch.Generator().manual_seed(0))
    call = CONTESTANTS[name](layer, approximation)
    if call is None:
        return float("nan")
    call(x)
    used = peak(lambda: call(x)) - 4.0 * layer.result_size
    return max(0.0, used) / (4 * x.numel())


def memory(layer: Layer, approximation: str) -> dict[str, float]:
    """Return the copies of the input that each of `MEASURED` needs, in fresh processes."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["torch", "einconv_kfac.curvature"])
    with context.Pool(1, maxtasksperchild=1) as pool:
        jobs = {n: pool.apply_async(copies, (layer, approximation, n)) for n in MEASURED}
        return {name: job.get() for name, job in jobs.items()}

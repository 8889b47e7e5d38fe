"""The example for several workers runs with torch's launcher."""

from __future__ import annotations

import re
import runpy
import sys
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import train_digits
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from worker_processes import run_workers

EXAMPLE = Path(train_digits.__file__).with_name("train_distributed.py")
ARGUMENTS = "--epochs", "3"


def printed() -> str:
    """What one of the launched workers prints."""
    sys.argv[:] = [str(EXAMPLE), *ARGUMENTS]
    with redirect_stdout(StringIO()) as output:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return output.getvalue()


def launched(rank: int, size: int) -> dict[int, str]:
    """What each of two workers prints that are launched as by ``torchrun --standalone``.

    They are forked from this process, which has imported what the example imports.
    """
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=2,
        run_id="example",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="fork",
        max_restarts=0,
    )
    found: dict[int, str] = elastic_launch(config, printed)()
    return found


def test_two_workers_train_alike() -> None:
    ((found,),) = run_workers("test_distributed_example.launched", 1).values()
    last = found[0].splitlines()[-1]
    match = re.fullmatch(r"test accuracy (.*)%; parameters of 2 workers differ by 0", last)
    assert match, last
    assert float(match[1]) > 85
    assert not found[1]

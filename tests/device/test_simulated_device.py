"""The package on a simulated CUDA device, in processes of their own.

The files of ``checks/`` hold the tests, and one process runs each file: the device must be known
before torch is imported, and nothing of it may reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from simulation import guard

HERE = Path(__file__).parent
CHECKS = sorted(path.stem for path in (HERE / "checks").glob("check_*.py"))


@pytest.fixture(scope="module", autouse=True)
def _device() -> None:
    if (reason := guard.reason_to_skip()) is not None:
        pytest.skip(reason)
    guard.built()


@pytest.fixture(scope="module")
def process() -> Iterator[subprocess.Popen[str]]:
    """The process that forks one for each file."""
    paths = [str(HERE / "simulation"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    pipe = subprocess.PIPE
    command = [sys.executable, str(HERE / "simulation" / "checks_process.py")]
    root = HERE.parents[1]
    with subprocess.Popen(
        command, stdin=pipe, stdout=pipe, text=True, cwd=root, env=environment
    ) as made:
        yield made


@pytest.mark.parametrize("checks", CHECKS)
def test_on_a_simulated_device(checks: str, process: subprocess.Popen[str], tmp_path: Path) -> None:
    """Run one file; ``python -m pytest -p simulated_device`` with the same options repeats it."""
    assert process.stdin is not None
    assert process.stdout is not None
    output = tmp_path / "output.txt"
    process.stdin.write(f"{HERE / 'checks' / checks}.py\t{output}\n")
    process.stdin.flush()
    status = process.stdout.readline()
    printed = output.read_text()
    assert status == "0\n", printed[-8000:]
    assert " passed" in printed


def test_the_device_stays_in_its_process() -> None:
    assert "simulated_device" not in sys.modules
    assert torch.version.cuda is not None or not torch.cuda.is_available()

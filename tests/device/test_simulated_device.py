"""The package on a simulated CUDA device, in processes of their own.

The files of ``checks/`` hold the tests, and one process runs each file: the device must be known
before torch is imported, and nothing of it may reach other tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
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


@pytest.mark.parametrize("checks", CHECKS)
def test_on_a_simulated_device(checks: str) -> None:
    """Run one file; ``python -m pytest`` with the same arguments repeats it by hand."""
    options = ["-q", "-p", "simulated_device", "-p", "no:cacheprovider", "-o", "addopts="]
    file = ["-o", "python_files=check_*.py", str(HERE / "checks" / f"{checks}.py")]
    paths = [str(HERE / "simulation"), str(HERE.parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *file],
        check=False,
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"{run.stdout[-6000:]}\n{run.stderr[-2000:]}"
    assert " passed" in run.stdout


def test_the_device_stays_in_its_process() -> None:
    assert "simulated_device" not in sys.modules
    assert torch.version.cuda is not None or not torch.cuda.is_available()

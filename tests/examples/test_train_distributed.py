"""The example for several workers runs with torch's launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


EXIT_OF_TORCH = "terminate called without an active exception"
"""What torch prints if a thread of its own outlives the interpreter (pytorch/pytorch#190489)."""


def launched(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the example with two workers, once more if torch fails at their exit."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for _ in range(2):
        found = subprocess.run(
            [*launcher, str(EXAMPLES / "train_distributed.py"), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
        )
        if EXIT_OF_TORCH not in found.stderr:
            break
    return found


def test_two_workers_train_alike() -> None:
    found = launched("--epochs", "5")
    assert found.returncode == 0, found.stderr
    last = found.stdout.splitlines()[-1]
    match = re.fullmatch(r"test accuracy (.*)%; parameters of 2 workers differ by 0", last)
    assert match, last
    assert float(match[1]) > 85

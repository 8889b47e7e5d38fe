"""The example for several workers runs with torch's launcher."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_two_workers_train_alike() -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = [str(EXAMPLES / "train_distributed.py"), "--epochs", "5"]
    found = subprocess.run(
        [*launcher, "--nproc-per-node=2", *script],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "OMP_NUM_THREADS": "1"},
    )
    assert found.returncode == 0, found.stderr
    last = found.stdout.splitlines()[-1]
    match = re.fullmatch(r"test accuracy (.*)%; parameters of 2 workers differ by 0", last)
    assert match, last
    assert float(match[1]) > 85

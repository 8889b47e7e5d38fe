"""Every benchmark that takes seconds with --quick starts, ends and writes its table."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_digits(tmp_path):
    table = tmp_path / "digits.txt"
    script = ROOT / "benchmarks" / "digits.py"
    command = [sys.executable, str(script), "--quick", "--output", str(table)]
    subprocess.run(
        command, check=True, capture_output=True, cwd=tmp_path
    )
    lines = table.read_text().splitlines()
    assert [line.split()[2] for line in lines if line.startswith("batch size")] == ["448,", "64,"]
    assert sum(line.split()[:2] == ["KFAC", "median"] for line in lines) == 2

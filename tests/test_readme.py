"""Every block of Python in the README runs, and its two commands are where .ci/run looks."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block{i}" for i in range(len(BLOCKS))])
def test_block_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("main", ("pip install", "examples/train_digits.py")),
        ("tests", ("pip install -e", "pytest")),
    ],
)
def test_command_is_found(name, words):
    script = ROOT / ".ci" / "readme_command"
    command = subprocess.run(
        ["bash", str(script), name], check=True, capture_output=True, text=True
    ).stdout
    assert all(word in command for word in words)


def test_unknown_command_is_refused():
    script = ROOT / ".ci" / "readme_command"
    result = subprocess.run(
        ["bash", str(script), "nothing"], check=False, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert "no command 'nothing'" in result.stderr

"""The benchmark of the operations starts, ends, and writes its table."""

from __future__ import annotations

from pathlib import Path

import operations


def test_operations(tmp_path: Path) -> None:
    table = tmp_path / "results" / "operations.txt"
    operations.main(["--quick", "--output", str(table)])
    lines = table.read_text(encoding="utf-8").splitlines()
    assert sum("geometric mean" in line and "ours" in line for line in lines) == 3
    assert any(line.startswith("building a 2d forward expression") for line in lines)

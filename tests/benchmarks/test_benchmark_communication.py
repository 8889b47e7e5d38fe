"""The benchmark of communication finds what its formulas say."""

from __future__ import annotations

from pathlib import Path

import communication
import pytest

LARGEST_DEVIATION = 2.0
"""Per cent."""


def test_records_what_is_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    communication.main(["--quick", "--output", str(tmp_path)])
    lines = (tmp_path / "communication-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    rows = [line.split() for line in lines if "fixed" in line and "2 " in line][:2]
    assert [row[2:5] for row in rows] == [["DDP", "fixed", "one"], ["fully_shard", "fixed", "all"]]
    for row in rows:
        assert abs(float(row[7])) < LARGEST_DEVIATION
        assert row[10] == "1.000"
    assert abs(float(rows[1][13])) < LARGEST_DEVIATION

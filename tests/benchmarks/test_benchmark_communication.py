"""The benchmark of communication finds what its formulas say."""

from __future__ import annotations

from pathlib import Path

import communication
import pytest
import torch

LARGEST_DEVIATION = 2.0
"""Per cent."""


@pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"),
    reason=f"`fully_shard` of torch {torch.__version__} needs a GPU",
)
def test_records_what_is_expected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    communication.main(["--quick", "--output", str(tmp_path)])
    lines = (tmp_path / "communication-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    rows = [line.split() for line in lines if "fixed" in line and "2 " in line][:3]
    ways = [["DDP", "one", "32"], ["fully_shard", "all", "32"], ["DDP", "all", "16"]]
    assert [[row[2], *row[4:6]] for row in rows] == ways
    for row in rows:
        assert abs(float(row[8])) < LARGEST_DEVIATION
        assert row[11] == "1.000"
    for row in rows[1:]:
        assert abs(float(row[14])) < LARGEST_DEVIATION
    halves = (float(row[7]) + float(row[13]) for row in rows[2:])
    assert next(halves) < 1.1 * float(rows[0][7])

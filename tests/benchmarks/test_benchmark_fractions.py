"""The benchmark of fractions prints its table."""

from __future__ import annotations

from pathlib import Path

import fractions_of_batches as fractions
import pytest


def test_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fractions.main(["--quick", "--output", str(tmp_path)])
    lines = (tmp_path / "fractions-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert [line.split()[0] for line in lines[3:]] == ["SGD", *["1"] * 4, *["2"] * 4]

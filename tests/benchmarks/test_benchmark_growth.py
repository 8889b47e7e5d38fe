"""The benchmark of growth prints its table, and nothing grows."""

from __future__ import annotations

from pathlib import Path

import growth
import pytest


@pytest.mark.parametrize("way", growth.WAYS)
def test_nothing_grows(way: str, capsys: pytest.CaptureFixture[str]) -> None:
    growth.main(["--way", way, "--steps", "3,8"])
    lines = capsys.readouterr().out.splitlines()
    (first, last) = [line.removeprefix(way).split() for line in lines]
    assert (first[0], last[0]) == ("3", "8")
    assert first[2:] == last[2:]


def test_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(growth, "WAYS", {"fixed": growth.WAYS["fixed"]})
    growth.main(["--quick", "--output", str(tmp_path)])
    lines = (tmp_path / "growth-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    assert [line.split()[:2] for line in lines[3:]] == [["fixed", "2"], ["fixed", "4"]]

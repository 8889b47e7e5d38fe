"""The benchmark of GPUs on the processor: it measures, and continues where it was cut."""

from __future__ import annotations

import json
from pathlib import Path

import gpu
import pytest
import torch
from gpu_lab import Lab

CPU = torch.device("cpu")


@pytest.mark.filterwarnings("ignore")
def test_prints_a_table_and_measures_nothing_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--device", "cpu", "--output", str(tmp_path)]
    gpu.main(arguments)
    rows = [json.loads(line) for line in (tmp_path / "cpu-quick.jsonl").read_text().splitlines()]
    found = {row["section"] for row in rows}
    assert found == gpu.SECTIONS.keys() - {"waits"}
    missing = [row for row in rows if "error" in row]
    assert all("pip install" in row["error"] for row in missing)  # of a peer
    for row in rows:
        for value in row.values():
            if isinstance(value, dict) and "error" in value:
                assert value["symmetric"], row["key"]
                assert value["error"] < 1e-5, row["key"]
    capsys.readouterr()
    gpu.main(arguments)
    again = [json.loads(line) for line in (tmp_path / "cpu-quick.jsonl").read_text().splitlines()]
    assert len(again) == len(rows) + len(missing)
    assert capsys.readouterr().out.endswith((tmp_path / "cpu-quick.txt").read_text())


def test_a_lab_records_failures_and_heeds_its_budget(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"

    def fail() -> dict[str, int]:
        raise ValueError("no")

    lab = Lab(CPU, path, budget=100.0, quick=True)
    lab.measure("a", "fails", 1, fail)
    lab.measure("a", "works", 1, lambda: {"value": 1})
    lab.measure("a", "takes too long", 1000, lambda: {"value": 1})
    path.write_text(path.read_text() + '{"section": "a", "key": "cut')
    again = Lab(CPU, path, budget=100.0, quick=True)
    assert [row["key"] for row in again.rows] == ["fails", "works"]
    assert again.rows[0]["error"] == "ValueError: no"
    assert not again.has("a", "fails")
    assert again.has("a", "works")
    again.measure("a", "works", 1, fail)
    again.measure("a", "fails", 1, lambda: {"value": 2})
    assert [json.loads(text)["key"] for text in path.read_text().splitlines()] == [
        *("fails", "works", "fails")
    ]


def test_an_error_of_the_device_ends_the_process(tmp_path: Path) -> None:
    def fail() -> dict[str, int]:
        raise RuntimeError("CUDA error: device-side assert triggered")

    lab = Lab(CPU, tmp_path / "records.jsonl", budget=100.0, quick=True)
    with pytest.raises(SystemExit, match=r"lost after a b\. Run again"):
        lab.measure("a", "b", 1, fail)
    assert lab.rows

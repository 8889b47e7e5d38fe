"""The trace of a step prints its tables, and counts calls and changes of file correctly."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import step_trace
from torch import nn

import einconv_kfac
from einconv_kfac.optim.schedule import is_due


@pytest.mark.parametrize("options", [[], ["--whole"]])
def test_prints_tables(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    step_trace.main(["--quick", *options])
    first, second = capsys.readouterr().out.split("\n\n")
    rows = dict(line.rsplit(maxsplit=6)[:2] for line in first.splitlines()[1:])
    assert rows["ordinary"].isdigit()
    assert any("factors" in kind for kind in rows)
    assert any("damping" in kind for kind in rows)
    assert any(line.startswith("optim/kfac.py") for line in second.splitlines())


def test_counts_calls_and_changes_of_file() -> None:
    trace = step_trace.Trace(Path(einconv_kfac.__file__).parent)
    trace.run(lambda: is_due(10, 0, 5))
    assert trace.calls["optim/schedule.py"] == 2  # `is_due` and `interval`
    assert trace.entries["optim/schedule.py"] == 1
    assert trace.calls.total() >= trace.entries.total()
    outside = step_trace.Trace(trace.root)
    outside.run(nn.ReLU().extra_repr)
    assert not outside.calls


def test_refuses_a_folder_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(SystemExit, match="`--package` must be a checkout of einconv_kfac"):
        step_trace.imported(tmp_path)

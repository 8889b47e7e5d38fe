"""The count of a step's operations prints its table, is deterministic, and counts correctly."""

from __future__ import annotations

from pathlib import Path

import pytest
import step_operations
import torch
from evidence.bottlenecks import bottleneck_resnet
from operation_count import OUTSIDE, OperationCount
from torch import nn

import einconv_kfac

PACKAGE = Path(einconv_kfac.__file__).parent


def test_prints_a_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_operations, "PERIODS", (2, 4))
    step_operations.main(["--quick", "--modes", "fixed", "--output", str(tmp_path)])
    lines = (tmp_path / "step_operations-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    names = [line[:22].strip() for line in lines[3:]]
    assert names[: len(step_operations.ROWS)] == list(step_operations.ROWS)
    numbers = [float(line[22:].split()[0]) for line in lines[3:]]
    outside, *parts, mean, ordinary, most = numbers
    assert mean == pytest.approx(sum(parts), abs=0.05)
    assert 0 < ordinary <= most
    assert outside == plain_count()


def plain_count() -> float:
    """The operations of forward and backward pass without an optimizer."""
    model, loss_fn = bottleneck_resnet((1, 1), 4, 10), nn.CrossEntropyLoss()
    x, y = torch.randn(2, 3, 16, 16), torch.tensor([1, 2])
    count = OperationCount(PACKAGE)
    with count.counting():
        loss_fn(model(x), y).backward()
    return count.operations[OUTSIDE]


def test_counts_are_the_same_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_operations, "PERIODS", (2, 4))
    runs = [
        step_operations.counts(einconv_kfac, bottleneck_resnet((1, 1), 4, 10), "fixed", 16, 2)
        for _ in range(2)
    ]
    assert runs[0] == runs[1]


def test_what_is_an_operation_or_a_wait() -> None:
    x = torch.ones(4)
    cases = {
        "operation": [lambda: x + 1, lambda: torch._foreach_add([x, x], 1.0), lambda: x.mul_(1)],
        "free": [lambda: x[1:], lambda: torch.empty(3), lambda: x.reshape(2, 2), lambda: x.dtype],
        "wait": [
            lambda: float(x[0]),
            lambda: bool(x[0]),
            lambda: x.tolist(),  # noqa: PLW0108 - looked up while counting
            lambda: x.cpu(),  # noqa: PLW0108
            lambda: x.nonzero(),  # noqa: PLW0108
            lambda: torch.equal(x, x),
        ],
    }
    found = {kind: [counted(call) for call in calls] for kind, calls in cases.items()}
    assert found["operation"] == [(1, 0)] * 3
    assert found["free"] == [(0, 0)] * 4
    assert found["wait"] == [(0, 1)] * 6
    mask = x > 0
    assert counted(lambda: x[mask]) == (0, 1)
    assert counted(lambda: x[[0, 1]])[1] == 0


def counted(call: object) -> tuple[int, int]:
    """The operations and waits of a call."""
    count = OperationCount(PACKAGE)
    assert callable(call)
    with torch.no_grad(), count.counting():
        call()
    return count.operations.total(), count.waits.total()

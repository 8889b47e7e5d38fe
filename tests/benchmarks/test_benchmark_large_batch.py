"""The benchmark of large batches counts steps to a loss, and searches the rates of peers."""

from __future__ import annotations

import math
from pathlib import Path

import large_batch
import pytest
import torch


def test_quick_run_has_a_table_of_each_task(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--quick", "--optimizers", "KFAC", "SGD", "--output", str(tmp_path)]
    large_batch.main(arguments)
    lines = (tmp_path / "large_batch-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines()[: len(lines)] == lines
    assert sum("steps to a training loss of 2.2" in line for line in lines) == len(
        large_batch.tasks(None)
    )
    assert sum(line.split()[:1] == ["16"] for line in lines) == len(large_batch.tasks(None))


def test_rate_with_the_fewest_steps_is_found() -> None:
    def steps(rate: float, limit: float) -> float:
        found = 10 + 100 * abs(math.log2(rate) + 4)
        return found if found <= limit else math.inf

    assert large_batch.searched(steps, 2.0**-2, 1000) == 2.0**-4
    assert large_batch.searched(steps, 2.0**-5, 1000) == 2.0**-4
    assert large_batch.searched(steps, 2.0**-6, 150) == 2.0**-4  # where the first has too many


def test_batches_are_of_any_size_and_each_epoch_has_all_examples() -> None:
    task = large_batch.tasks(None)[1]
    count = len(task.examples)
    data = large_batch.drawn(task, 2 * count, seed=0)
    x, y = next(data)
    assert len(x) == len(y) == 2 * count
    for part in y.split(count):
        assert torch.equal(part.sort().values, task.examples.y.sort().values)


def test_digits_are_moved_by_at_most_one_pixel() -> None:
    images = torch.zeros(200, 1, 8, 8)
    images[:, 0, 3, 4] = 1
    moved = large_batch.shifted(images, torch.Generator().manual_seed(0))
    places = {tuple(place.tolist()) for place in moved[:, 0].nonzero()[:, 1:]}
    assert places == {(row, column) for row in (2, 3, 4) for column in (3, 4, 5)}
    assert moved.sum() == len(images)

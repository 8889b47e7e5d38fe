"""The rows of docs/scripts.md, run; those that need other libraries are in tests/ecosystem."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import scripts_of_loops
import scripts_of_losses
import scripts_of_models
from documented_scripts import SCRIPTS

DOCUMENT = Path(__file__).parents[2] / "docs" / "scripts.md"
ECOSYSTEM = (
    "a Hugging Face model", "Transformers' Trainer", "Lightning, automatic optimization",
    "Lightning, manual optimization", "Accelerate", "PEFT", "PyTorch Geometric",
    "fastai", "DeepXDE, with PyTorch",
)  # fmt: skip
RUN = scripts_of_losses, scripts_of_loops, scripts_of_models
"""The files that fill the table."""


def rows() -> list[str]:
    """Return the first column of the document's table."""
    lines = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return [line.split(" | ")[0].removeprefix("| ") for line in lines[1:]]


def test_every_row_is_run() -> None:
    assert sorted(rows()) == sorted([*SCRIPTS, *ECOSYSTEM])


@pytest.mark.parametrize("row", SCRIPTS)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_row(row: str) -> None:
    losses = SCRIPTS[row]()
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]

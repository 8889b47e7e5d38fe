"""The benchmark of steps prints its table."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import step
import torch
from evidence.vision import resnet18


@pytest.mark.filterwarnings("ignore")
def test_prints_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    step.main(["--quick", "--output", str(tmp_path)])
    lines = (tmp_path / "step-quick.txt").read_text().splitlines()
    assert capsys.readouterr().out.splitlines() == lines
    for name in step.BUILDS:
        (line,) = [line for line in lines if line.startswith(name)]
        assert "refused" not in line or "pip install" in line


@pytest.mark.skipif(find_spec("torchvision") is None, reason="torchvision is not installed")
def test_resnet18_is_that_of_small_images() -> None:
    model = resnet18().eval()
    features = torch.nn.Sequential(*list(model.children())[:-2])
    assert features(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 4, 4)

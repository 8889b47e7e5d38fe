"""The code of the page on expressions runs and prints the output shown there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from einconv_kfac.network import draw

PAGE = Path(__file__).parents[2] / "docs" / "expressions.md"


def test_page_runs_and_prints_what_it_shows(capsys: pytest.CaptureFixture[str]) -> None:
    text = PAGE.read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(block, names)
    (shown,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    assert shown in capsys.readouterr().out


def test_pictures_are_current() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.DOTALL)
    exec(blocks[0] + blocks[1], names)
    images = PAGE.parent / "images"
    assert (images / "forward.svg").read_text(encoding="utf-8") == draw(names["network"]).svg
    simple = (images / "forward_simplified.svg").read_text(encoding="utf-8")
    assert simple == names["picture"].svg

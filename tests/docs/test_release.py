"""What a release needs to agree on."""

from __future__ import annotations

import re
from configparser import ConfigParser
from pathlib import Path

import einconv_kfac

ROOT = Path(__file__).resolve().parents[2]


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_citation_has_the_version() -> None:
    assert f"\nversion: {einconv_kfac.__version__}\n" in text("CITATION.cff")


def test_oldest_versions_are_those_of_the_readme() -> None:
    config = ConfigParser()
    config.read(ROOT / "setup.cfg")
    python = config["options"]["python_requires"].removeprefix(">=")
    (torch,) = re.findall(r"torch>=([\d.]+)", config["options"]["install_requires"])
    for page in ("README.md", "docs/limits.md"):
        assert re.search(rf"Python {re.escape(python)} (or|and) newer", text(page)), page
        assert re.search(rf"PyTorch {re.escape(torch)} (or|and) newer", text(page)), page


def test_readme_is_short_and_its_first_picture_exists() -> None:
    lines = text("README.md").splitlines()
    assert len(lines) <= 150
    first = re.search(r"!\[[^\]]+\]\(([^)]+)\)", text("README.md"))
    assert first is not None
    assert (ROOT / first.group(1)).read_bytes().startswith(b"\x89PNG")

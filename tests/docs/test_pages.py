"""Blocks of Python on the documentation's pages run, one after the other; links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
ALL = [*PAGES, *sorted(ROOT.glob("*.md")), ROOT / "benchmarks" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.M | re.S)
LINK = re.compile(r"\]\(([^)\s]+)\)")
ELSEWHERE = {"curvature.md", "expressions.md"}
"""Top-level pages with tests of their own, which also look at what the blocks compute."""


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> list[str]:
    return BLOCK.findall(page.read_text(encoding="utf-8"))


RUN = [p for p in PAGES if blocks(p) and not (p.parent == DOCS and p.name in ELSEWHERE)]


@pytest.mark.parametrize("page", RUN, ids=name)
def test_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        exec(compile(block, str(page), "exec"), names)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as in the site and in the repository's browser."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ +(.*)$", text, re.M)
    words = (re.sub(r"[^\w\s-]", "", heading.lower()) for heading in headings)
    return {re.sub(r"\s+", "-", word.strip()) for word in words}


@pytest.mark.parametrize("page", ALL, ids=name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for link in LINK.findall(text):
        if ":" in link:
            continue
        target, _, anchor = link.partition("#")
        found = (page.parent / target).resolve() if target else page
        assert found.exists(), f"{name(page)} links to {link}"
        assert found.is_relative_to(ROOT)
        if anchor:
            assert anchor in anchors(found), f"{name(page)} links to {link}"


def test_the_navigation_names_pages() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r": ([\w/]+\.md)$", config, re.M)
    assert len(listed) > 20
    assert len(set(listed)) == len(listed)
    assert {DOCS / page for page in listed} <= set(PAGES)


def test_every_example_is_in_the_gallery() -> None:
    text = (DOCS / "gallery.md").read_text(encoding="utf-8")
    for path in (ROOT / "examples").glob("*.py"):
        assert f"(../examples/{path.name})" in text, f"{path.name} is missing"

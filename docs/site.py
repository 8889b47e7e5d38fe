"""Hooks of mkdocs: files outside of docs/, links to them, and equations as MathML.

Pages link to `../benchmarks/...`, `../examples/...` and `../CONTRIBUTING.md`, so that the links
work in the repository, too. Here these files become part of the site, and examples become pages.
Equations stand in
``$$ ... $$``, or in a line between ``$`` and backticks, and become MathML, which browsers draw
without scripts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
ADDED = ("benchmarks/results/*.*", "benchmarks/results/half/*.*", "examples/*.py")
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks/README.md")
LINK = re.compile(r"(\]\()([^)\s#]+)([^)]*\))")
DISPLAY = re.compile(r"^( *)\$\$\n(.*?)\n *\$\$$", re.M | re.S)
INLINE = re.compile(r"\$`([^`]+)`\$")


def paths() -> list[Path]:
    """Return the files outside of docs/ that are part of the site."""
    found = [path for pattern in ADDED for path in sorted(ROOT.glob(pattern))]
    return found + [ROOT / name for name in PAGES if (ROOT / name).exists()]


def place(path: Path) -> str:
    """Return where a file is in the site."""
    name = str(path.relative_to(ROOT)).replace("README.md", "about.md")
    return name.removesuffix(".py") + ".md" if path.suffix == ".py" else name


def listed(nav: Any) -> list[str]:
    """Return the pages in a navigation."""
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in listed(entry)]


def on_config(config: Any) -> Any:
    """Add a section with the pages that the navigation does not name."""
    pages = (str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md"))
    if rest := sorted(set(pages) - set(listed(config.nav))):
        config.nav.append({"More": rest})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the files to the site."""
    for path in paths():
        if path.suffix == ".py":
            page = f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8')}```\n"
            files.append(File.generated(config, place(path), content=page))
        else:
            files.append(File.generated(config, place(path), abs_src_path=str(path)))
    return files


def rewritten(link: str, page: str) -> str:
    """Return a link from a page as one inside of the site."""
    folder = (ROOT / page if page in map(place, paths()) else ROOT / "docs" / page).parent
    target = (folder / link).resolve()
    known = {path.resolve(): place(path) for path in paths()}
    docs = ROOT / "docs"
    own = folder.relative_to(docs if folder.is_relative_to(docs) else ROOT)
    up = "../" * len(own.parts)
    if target in known:
        return up + known[target]
    if target.is_relative_to(docs) and not folder.is_relative_to(docs):
        return up + str(target.relative_to(docs))
    return link


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links, and equations."""
    source = page.file.src_uri

    def link(match: re.Match[str]) -> str:
        start, target, end = match.groups()
        if ":" in target:
            return match.group()
        return start + rewritten(target, source) + end

    def display(match: re.Match[str]) -> str:
        return match.group(1) + convert(match.group(2), display="block").replace("\n", " ")

    markdown = DISPLAY.sub(display, LINK.sub(link, markdown))
    return INLINE.sub(inline, markdown)


def inline(match: re.Match[str]) -> str:
    """Return an equation inside of a line; in a span, since Markdown takes ``math`` for a block."""
    return f"<span>{convert(match.group(1))}</span>"

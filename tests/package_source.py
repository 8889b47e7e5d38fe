"""The package as its source has it: files, what they define, and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SPEC = find_spec("einconv_kfac")
assert SPEC is not None
assert SPEC.origin is not None
PACKAGE = Path(SPEC.origin).resolve().parent
"""What the tests import: the package of this checkout, or one that a wheel has installed."""


@cache
def files() -> dict[str, Path]:
    """The files of the package by dotted name; a folder's `__init__` has the folder's."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def source(module: str) -> str:
    return files()[module].read_text(encoding="utf-8")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


def imported_names(module: str) -> Iterator[tuple[str, str, str]]:
    """Yield what a file imports: a module, a name in it ("" for the module itself), its alias.

    Imports inside functions and under ``TYPE_CHECKING`` count.
    """
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "", alias.asname or alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {module}"
            for alias in node.names:
                yield str(node.module), alias.name, alias.asname or alias.name


@cache
def imports(module: str) -> frozenset[str]:
    """The modules that a file names in its imports, of the package and of others.

    ``from package import file`` is an import of the file.
    """
    found = set()
    for origin, name, _ in imported_names(module):
        inner = f"{origin}.{name}"
        found.add(inner if inner in files() else origin)
    return frozenset(found)


@cache
def _lines(module: str) -> list[bytes]:
    return source(module).encode().splitlines(keepends=True)


def segment(module: str, node: ast.expr | ast.stmt) -> str:
    """The source of a node, as `ast.get_source_segment` returns it, with the lines cached."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    lines = _lines(module)[first : last + 1]
    lines[-1] = lines[-1][: node.end_col_offset]
    lines[0] = lines[0][node.col_offset :]
    return b"".join(lines).decode()

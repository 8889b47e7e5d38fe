"""Files import each other without circles, and kernels only geometry and padding."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from package_source import PACKAGE

ROOMS = ("geometry", "padding", "network", "expressions", "evaluate", "functionals", "modules")


def file_of(module: str) -> Path | None:
    """The file of a module of the package."""
    if module.partition(".")[0] != PACKAGE.name:
        return None
    path = PACKAGE.parent / module.replace(".", "/")
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def imported_files(path: Path) -> set[Path]:
    """The files of the package that a file imports anywhere, also in functions."""
    files: set[Path | None] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            files.update(file_of(alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = str(node.module)
            names = (file_of(f"{module}.{alias.name}") for alias in node.names)
            files.update(name or file_of(module) for name in names)
    return {file for file in files if file is not None}


def files_of(room: str) -> list[Path]:
    return [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")]


@pytest.mark.parametrize("room", ROOMS)
def test_no_circles(room: str) -> None:
    graph = {path: imported_files(path) for path in files_of(room)}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_kernels_import_only_geometry_and_padding() -> None:
    for path in files_of("evaluate/kernels"):
        for other in imported_files(path):
            rooms = other.relative_to(PACKAGE).with_suffix("").parts
            allowed = rooms[0] in ("geometry", "padding") or rooms[:2] == ("evaluate", "kernels")
            assert allowed, f"{path} imports {other}"

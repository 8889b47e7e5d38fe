"""Imports point one way, and the root link to the optimizer resolves."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "einconv_kfac"
ALLOWED = {
    "geometry": set(),
    "padding": set(),
    "network": {"geometry"},
    "expressions": {"geometry", "padding", "network"},
    "evaluate": {"geometry", "padding", "network", "expressions"},
    "functionals": {"geometry", "padding", "network", "expressions", "evaluate"},
    "modules": {"geometry", "padding", "network", "expressions", "evaluate", "functionals"},
    "curvature": {"geometry", "padding", "network", "expressions", "evaluate"},
    "optim": {"geometry", "padding", "network", "expressions", "evaluate", "curvature"},
}


def imported(path: Path) -> set[str]:
    """The rooms of the package, and the outside packages, that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module == "einconv_kfac":
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            names.add(str(node.module))
    return {n.removeprefix("einconv_kfac.").partition(".")[0] for n in names}


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_one_way(room: str) -> None:
    files = [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")]
    for path in files:
        wrong = imported(path) & (set(ALLOWED) - ALLOWED[room] - {room})
        assert not wrong, f"{path} imports {wrong}"


@pytest.mark.parametrize("room", ["geometry", "network"])
def test_networks_know_no_tensors(room: str) -> None:
    for path in [*PACKAGE.glob(f"{room}.py"), *PACKAGE.glob(f"{room}/**/*.py")]:
        assert "torch" not in imported(path), path


def test_root_link_resolves() -> None:
    assert (ROOT / "optim").is_symlink()
    assert (ROOT / "optim").resolve() == PACKAGE / "optim"
    assert (ROOT / "optim" / "__init__.py").is_file()

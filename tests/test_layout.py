"""The layout of the package: which room imports which, and how large a file may be.

Each rule yields what breaks it. What is broken today stands in ``KNOWN``, and a test fails both for
a new entry and for one that is no longer needed.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from package_source import PACKAGE, ROOT, files, imports, source, tree

KNOWN: dict[str, set[str]] = {}
"""What breaks a rule today, by rule; each entry is to be removed, none to be added."""

TENSORS = {"geometry", "padding", "network", "expressions", "evaluate"}
ALLOWED: Mapping[str, set[str]] = {
    "geometry": set(),
    "padding": set(),
    "network": {"geometry"},
    "expressions": {"geometry", "padding", "network"},
    "evaluate": {"geometry", "padding", "network", "expressions"},
    "functionals": TENSORS,
    "modules": TENSORS | {"functionals"},
    "torch_versions": set(),
    "distributed": {"torch_versions"},
    "curvature": TENSORS | {"torch_versions", "distributed"},
    "optim": TENSORS | {"torch_versions", "distributed", "curvature"},
}
"""The rooms that a room may import."""

FLOORS: Mapping[str, Sequence[set[str]]] = {
    "optim": (
        {"arguments"},
        {"model_walk"},
        {"schedule", "vectors", "moving_average", "parameters", "pickling", "state_schema"},
        {"definiteness"},
        {"hyperparameters"},
        {"replay", "inverses"},
        {"recording"},
        {"factors"},
        {"preconditioner", "step"},
        {"diagnostics"},
        {"curvature_optimizer"},
        {"kfac"},
    ),
    "optim/step": (
        {"group_settings", "gradient_scaler", "in_place", "reading", "rollback", "selection"},
        {"parameter_change"},
        {"fallback"},
        {"objective"},
        {"clipping", "decoupled_decay", "held_norms", "late_check", "momentum"},
        {"rounding", "step_protocol"},
        {"agreement", "fixed"},
        {"capturable", "fits"},
        {"damping", "promise"},
        {"comparison"},
        {"policy_bound", "prepared_update", "states", "step_fit"},
        {"first_reading", "runner"},
        {"automatic"},
        {"modes"},
    ),
    "curvature": (
        {"arguments", "module_hooks"},
        {"devices", "type_registry", "text_table", "module_arguments"},
        {"blocks", "factors", "losses"},
        {"layers", "objective"},
        {"estimation"},
        {"interop"},
    ),
}
"""Inner rooms from the ground up; each may import those of the floors below its own."""

WITHOUT_TORCH = ("geometry", "network", "curvature.factors.indices")
LINES_OF_A_FILE = 300
LINES_OF_A_FUNCTION = 40


def short(module: str) -> str:
    """A module's name without that of the package."""
    return module.removeprefix("einconv_kfac").removeprefix(".")


def inside(room: str) -> list[str]:
    """The files of a room, which is a file or a folder."""
    return [m for m in files() if short(m) == room or short(m).startswith(f"{room}.")]


def arrows(room: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield the imports between the parts of a room, or of the package: file, part, part."""
    start = f"{room}." if room else ""
    for module in files():
        if short(module).startswith(start) and short(module):
            own = short(module).removeprefix(start).partition(".")[0]
            for other in imports(module) & files().keys():
                target = short(other).removeprefix(start).partition(".")[0]
                if short(other).startswith(start) and target != own:
                    yield short(module), own, target


def wrong_rooms() -> Iterator[str]:
    for file, own, other in arrows():
        if other not in ALLOWED.get(own, set()):
            yield f"{file} imports {other or 'the package itself'}"


def wrong_floors() -> Iterator[str]:
    for room, floors in FLOORS.items():
        height = {name: index for index, floor in enumerate(floors) for name in floor}
        for file, own, other in arrows(room.replace("/", ".")):
            if not height.get(other, len(floors)) < height.get(own, -1):
                yield f"{file} imports {other}"


def unknown_rooms() -> Iterator[str]:
    known = {"": set(ALLOWED), **{room: set().union(*floors) for room, floors in FLOORS.items()}}
    for room, names in known.items():
        for path in (PACKAGE / room).iterdir():
            has_code = path.suffix == ".py" or (path / "__init__.py").exists()
            if has_code and path.stem not in names | {"__init__"}:
                yield f"{room}: {path.stem}"


def circles() -> Iterator[str]:
    """Yield each group of files of which every one imports every other, directly or not."""
    reached = {module: _reached(module) for module in files()}
    groups = {
        frozenset(other for other in found if module in reached[other])
        for module, found in reached.items()
        if module in found
    }
    yield from (", ".join(sorted(map(short, group))) for group in groups)


def _reached(module: str) -> set[str]:
    """The files that a file imports, directly or not."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        new = (imports(waiting.pop()) & files().keys()) - found
        found |= new
        waiting += new
    return found


def torch_without_need() -> Iterator[str]:
    for room in WITHOUT_TORCH:
        for module in inside(room):
            if any(name.split(".")[0] == "torch" for name in imports(module)):
                yield short(module)


def long_files() -> Iterator[str]:
    for module in files():
        if len(source(module).splitlines()) > LINES_OF_A_FILE:
            yield short(module)


def long_functions() -> Iterator[str]:
    for module in files():
        for node in ast.walk(tree(module)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                body = node.body[ast.get_docstring(node) is not None :]
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                if lines > LINES_OF_A_FUNCTION:
                    yield f"{short(module)}: {node.name}"


def repeated_file_names() -> Iterator[str]:
    for room in FLOORS:
        names = Counter(path.name for path in (PACKAGE / room).rglob("*.py"))
        del names["__init__.py"]
        yield from (f"{room}: {name}" for name, count in names.items() if count > 1)


def undescribed_folders() -> Iterator[str]:
    """Yield the folders whose docstring is missing, or does not start with one line."""
    for module, path in files().items():
        if path.name == "__init__.py":
            text = ast.get_docstring(tree(module)) or ""
            if len(text.partition("\n\n")[0].splitlines()) != 1:
                yield short(module)


RULES: Mapping[str, Callable[[], Iterator[str]]] = {
    "rooms import what they may": wrong_rooms,
    "inner rooms import what they may": wrong_floors,
    "every room has its place": unknown_rooms,
    "no circles": circles,
    "no torch where none is needed": torch_without_need,
    "short files": long_files,
    "short functions": long_functions,
    "unique file names": repeated_file_names,
    "folders say what they hold": undescribed_folders,
}


@pytest.mark.parametrize("rule", RULES)
def test_rule_holds(rule: str) -> None:
    found, known = set(RULES[rule]()), KNOWN.get(rule, set())
    assert not found - known, f"breaks the rule '{rule}'"
    assert not known - found, f"no longer breaks the rule '{rule}': remove it from KNOWN"


@pytest.mark.skipif(PACKAGE.parent != ROOT, reason="the package of a wheel has no link beside it")
def test_root_link_resolves() -> None:
    assert (ROOT / "optim").is_symlink()
    assert (ROOT / "optim").resolve() == PACKAGE / "optim"
    assert (ROOT / "optim" / "__init__.py").is_file()

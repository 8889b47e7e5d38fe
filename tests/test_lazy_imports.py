"""What ``import einconv_kfac`` imports, and the names that it has all the same."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from importlib import import_module
from types import ModuleType

import pytest
from fresh_interpreter import printed
from package_source import PACKAGE, ROOT, imported_names, tree

import einconv_kfac

HEAVY = {
    "matplotlib",
    "networkx",
    "numpy",
    "opt_einsum",
    "scipy",
    "sklearn",
    "sympy",
    "torch._dynamo",
    "torch._inductor",
    "torch.distributed",
    "torch.fx",
    "torchvision",
    "tqdm",
    "triton",
}
"""None of these is imported that `torch` has not imported already."""
MODULES = 5
"""At most so many modules does ``import einconv_kfac`` import."""

ROOMS = sorted(path.parent.name for path in PACKAGE.glob("*/__init__.py"))


@cache
def imported_by(statements: str, *, has_torch: bool = True) -> frozenset[str]:
    """The modules that statements import in a new interpreter, which may have imported torch."""
    code = f"import sys\nbefore = set(sys.modules)\n{statements}\n"
    code += "print(*sorted(set(sys.modules) - before))"
    if has_torch:
        return frozenset(printed(code).split())
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    return frozenset(result.stdout.split())


def fresh() -> ModuleType:
    """The package's own file, run again under another name: nothing is imported through it yet."""
    spec = importlib.util.spec_from_file_location("fresh_package", PACKAGE / "__init__.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def within(module: str, packages: set[str]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in packages)


def test_import_of_the_package_imports_next_to_nothing() -> None:
    found = imported_by("import einconv_kfac")
    assert "einconv_kfac" in found
    assert not {module for module in found if within(module, HEAVY)}
    assert len(found) <= MODULES, sorted(found)


def test_optimizer_imports_no_heavy_module() -> None:
    found = imported_by("from einconv_kfac import KFAC")
    assert "einconv_kfac.optim.kfac" in found
    assert not {module for module in found if within(module, HEAVY)}


def test_functions_and_layers_import_no_optimizer() -> None:
    found = imported_by("from einconv_kfac import modules, functionals")
    assert "einconv_kfac.modules.conv" in found
    assert not {m for m in found if within(m, {"einconv_kfac.optim", "einconv_kfac.curvature"})}


@pytest.mark.parametrize("room", ["geometry", "network"])
def test_rooms_without_tensors_import_no_torch(room: str) -> None:
    found = imported_by(f"import einconv_kfac.{room}", has_torch=False)
    assert f"einconv_kfac.{room}" in found
    assert "torch" not in found


def test_names_are_imported_from_where_type_checkers_find_them() -> None:
    blocks = [node for node in tree("einconv_kfac").body if isinstance(node, ast.If)]
    checked = {name: origin for origin, name, _ in imported_names("einconv_kfac") if name}
    del checked["import_module"], checked["TYPE_CHECKING"]
    assert blocks
    assert {*checked, "__version__"} == set(einconv_kfac.__all__)
    module = fresh()
    for name, origin in checked.items():
        home = import_module(origin)
        assert getattr(module, name) is getattr(home, name), name


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_attributes(room: str) -> None:
    assert getattr(fresh(), room) is import_module(f"einconv_kfac.{room}")


def test_names_that_are_not_imported_yet_are_listed() -> None:
    assert {*einconv_kfac.__all__, *ROOMS} <= set(dir(fresh()))


def test_star_imports_all_public_names() -> None:
    names: dict[str, object] = {}
    exec("from einconv_kfac import *", names)
    assert set(einconv_kfac.__all__) <= names.keys()


def test_other_names_are_refused() -> None:
    with pytest.raises(AttributeError, match="module 'einconv_kfac' has no attribute 'KFCA'"):
        _ = einconv_kfac.KFCA  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="KFCA"):
        exec("from einconv_kfac import KFCA")

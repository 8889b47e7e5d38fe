"""The public names and signatures are those of public_surface.txt, so that review sees changes.

``python tests/test_public_surface.py --write`` writes that file from the source.
"""

from __future__ import annotations

import sys
from difflib import unified_diff
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest
from package_source import files
from package_surface import public_names, surface

COMMAND = "python tests/test_public_surface.py --write"
LISTING = Path(__file__).with_name("public_surface.txt")
ROOMS = (
    "einconv_kfac.optim",
    "einconv_kfac.curvature",
    "einconv_kfac.curvature.interop.backpack",
    "einconv_kfac.curvature.interop.curvlinops",
    "einconv_kfac.curvature.interop.laplace",
    "einconv_kfac.expressions",
    "einconv_kfac.functionals",
    "einconv_kfac.modules",
    "einconv_kfac.network",
    "einconv_kfac.geometry",
)


@cache
def listing() -> list[str]:
    """The surface as it is: rooms, then operations, then what stands at the top."""
    operations = [
        module
        for module in files()
        if module.startswith("einconv_kfac.expressions.")
        and "einsum_expression" in public_names(module)
    ]
    return surface((*ROOMS, *operations, "einconv_kfac"))


def test_surface_is_as_listed() -> None:
    listed = LISTING.read_text(encoding="utf-8").splitlines()
    changes = unified_diff(listed, listing(), "listed", "in the source", lineterm="", n=2)
    text = "\n".join(changes)
    assert not text, f"The public surface has changed. If it should, run\n{COMMAND}\n\n{text}"


@pytest.mark.parametrize("room", [*ROOMS, "einconv_kfac"])
def test_listed_names_exist(room: str) -> None:
    optional = ".interop." in room
    module = pytest.importorskip(room, exc_type=ImportError) if optional else import_module(room)
    missing = [name for name in public_names(room) if not hasattr(module, name)]
    assert not missing


def test_signatures_are_spelled_as_in_the_source() -> None:
    lines = [line.strip() for line in listing()]
    assert "lr: float | None = None," in lines
    assert 'kl_clip: Clip = "auto",' in lines
    assert "modules: module" in lines
    assert "KFAC: see einconv_kfac.optim" in lines


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(f"usage: {COMMAND}")
    LISTING.write_text("\n".join(listing()) + "\n", encoding="utf-8")

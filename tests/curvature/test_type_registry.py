"""Dispatch by type of module, and rules found in the files of a package."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import pytest
from torch import nn

from einconv_kfac.curvature.type_registry import TypeRegistry, defined_classes


class Child(nn.Linear):
    pass


def test_the_nearest_base_class_applies() -> None:
    registry = TypeRegistry({nn.Linear: "linear", nn.Module: "module"})
    assert registry.rule(Child(1, 1)) == "linear"
    assert registry.rule(nn.ReLU()) == "module"
    assert list(registry.fitting(nn.Linear(1, 1))) == [
        (nn.Linear, "linear"),
        (nn.Module, "module"),
    ]


def test_a_later_rule_comes_first() -> None:
    registry = TypeRegistry({Child: "child"})
    assert registry.rule(nn.Linear(1, 1)) is None
    registry.register(nn.Linear, "linear")
    assert registry.rule(Child(1, 1)) == "linear"
    registry.register(nn.Linear, "last")
    assert registry.rule(Child(1, 1)) == "last"
    assert [rule for _, rule in registry] == ["child", "linear", "last"]


def test_classes_of_a_new_file_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "rules_of_a_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "second.py").write_text("from .first import One\nclass Two(One): pass\n")
    (package / "first.py").write_text(
        "from abc import ABC, abstractmethod\n"
        "class Abstract(Exception, ABC):\n"
        "    @abstractmethod\n"
        "    def method(self): ...\n"
        "class One(Exception): pass\n"
        "class Other: pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    found = defined_classes(import_module("rules_of_a_test"), Exception)
    assert [cls.__name__ for cls in found] == ["One", "Two"]

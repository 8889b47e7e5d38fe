"""Which modules a user leaves out."""

from __future__ import annotations

from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

Exclusion: TypeAlias = str | nn.Module | Collection[str | nn.Module]
"""Modules, names of modules, or patterns of names as for files."""


def excluded_modules(model: nn.Module, exclude: Exclusion) -> set[nn.Module]:
    """Return the modules that are left out, with all that they contain.

    Args:
        model: The model.
        exclude: Modules of the model, their names, or patterns such as ``"encoder.*"``.

    Raises:
        ValueError: If an entry is not a module of the model and matches none.
    """
    entries = [exclude] if isinstance(exclude, (str, nn.Module)) else exclude
    named = dict(model.named_modules(remove_duplicate=False))
    chosen: set[nn.Module] = set()
    for entry in entries:
        if isinstance(entry, str):
            found = {module for name, module in named.items() if fnmatchcase(name, entry)}
        else:
            found = {entry} & set(named.values())
        if not found:
            given = repr(entry) if isinstance(entry, str) else type(entry).__name__
            known = ", ".join(repr(name) for name in named if name)
            raise ValueError(
                f"`exclude` must name modules of `model`, got {given}. Its modules are {known}."
            )
        chosen |= found
    return {inner for module in chosen for inner in module.modules()}

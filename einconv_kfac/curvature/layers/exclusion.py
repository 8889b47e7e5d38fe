"""Modules of a model that are left out."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import Tensor, nn

Entry: TypeAlias = str | nn.Module | type[nn.Module]
Exclusion: TypeAlias = Entry | Collection[Entry]
"""Modules, types of modules, names of modules, or patterns of names as for files."""


def excluded_modules(model: nn.Module, exclude: Exclusion) -> set[nn.Module]:
    """Return the modules that are left out, with all that they contain.

    Args:
        model: The model.
        exclude: Modules of the model, their types, their names, or patterns such as
            ``"encoder.*"``.

    Raises:
        ValueError: If an entry is not a module of the model and matches none.
    """
    entries = [exclude] if isinstance(exclude, (str, nn.Module, type)) else exclude
    if isinstance(entries, Tensor) or not (
        isinstance(entries, Collection)
        and all(isinstance(entry, (str, nn.Module, type)) for entry in entries)
    ):
        raise ValueError(
            "`exclude` must be modules of `model`, their types, their names or patterns, got "
            f"{reprlib.repr(exclude)}."
        )
    named = dict(nn.Module.named_modules(model, remove_duplicate=False))
    chosen: set[nn.Module] = set()
    for entry in entries:
        found = _matching(named, entry)
        if not found:
            given = repr(entry) if isinstance(entry, str) else getattr(entry, "__name__", None)
            known = ", ".join(repr(name) for name in named if name)
            raise ValueError(
                f"`exclude` must name modules of `model`, got {given or type(entry).__name__}. Its "
                f"modules are {known}."
            )
        chosen |= found
    return {inner for module in chosen for inner in module.modules()}


def _matching(named: dict[str, nn.Module], entry: Entry) -> set[nn.Module]:
    """Return the modules that an entry matches."""
    if isinstance(entry, str):
        return {module for name, module in named.items() if fnmatchcase(name, entry)}
    if isinstance(entry, type):
        return {module for module in named.values() if isinstance(module, entry)}
    return {entry} & set(named.values())

"""Which parameters of a model are trained, and how."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeAlias

from torch import nn

from einconv_kfac.curvature.text_table import table

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


class Training(dict[str, str]):
    """How each parameter is trained, by its name; prints as a table.

    ``"kfac"``, the name of the fallback, ``"frozen"``, or ``"left out"`` if the optimizer does
    not have the parameter.
    """

    def __str__(self) -> str:
        return table(("parameter", "trained by"), list(self.items()))


def training(
    model: nn.Module, own: Collection[str], covered: Collection[str], fallback: str
) -> Training:
    """Return how each parameter of a model is trained.

    Args:
        model: The model.
        own: Names of the optimizer's parameters.
        covered: Names of the parameters that factors cover.
        fallback: How the others are trained.
    """
    kinds = Training()
    for name, parameter in model.named_parameters():
        kind = "kfac" if name in covered else fallback
        kind = kind if name in own else "left out"
        kinds[name] = kind if parameter.requires_grad else "frozen"
    return kinds


def check_member(parameters: Iterable[nn.Parameter], names: Mapping[nn.Parameter, str]) -> None:
    """Raise a ``ValueError`` if a parameter is not the model's."""
    for parameter in parameters:
        if parameter not in names:
            shape = list(parameter.shape)
            raise ValueError(f"`params` must be parameters of `model`, got one of {shape}.")


def uncovered(model: nn.Module, names: Collection[str]) -> str:
    """Return what to say about parameters without Kronecker factors."""
    modules = dict(model.named_modules())
    kinds = {name: type(modules[name.rpartition(".")[0]]).__name__ for name in names}
    listed = ", ".join(f"'{name}' ({kind})" for name, kind in kinds.items())
    return (
        f"`strict`=True needs Kronecker factors for every parameter, got none for {listed}. "
        "Pass strict=False to train these by the fallback, or leave them out of `params`."
    )

"""Rules by the type of the modules that they apply to, found in the files of a package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from types import ModuleType
from typing import Any, Generic, TypeAlias, TypeVar

from torch import nn

from einconv_kfac.curvature.arguments import described

T = TypeVar("T")
Kind: TypeAlias = "type[nn.Module] | str"
"""A type of module, or its module and name, so that its library need not be imported."""


def defined_classes(package: ModuleType, kind: type[Any]) -> list[type[Any]]:
    """Return the concrete subclasses of ``kind`` that the files of a package define.

    The order is that of the file names, and within a file that of the definitions.

    >>> from einconv_kfac.curvature.losses import rules
    >>> [cls.__name__ for cls in defined_classes(rules, object)][:2]
    ['CrossEntropyRule', 'EntrywiseRule']
    """
    names = [file.name for file in iter_modules(package.__path__, f"{package.__name__}.")]
    return [
        value
        for name in names
        for value in vars(import_module(name)).values()
        if issubclass(type(value), type)  # `list[int]` in Python 3.10 says that it is a type
        if issubclass(value, kind)
        if value.__module__ == name and not isabstract(value)
    ]


class TypeRegistry(Generic[T]):
    """Rules by type of module; subclasses count.

    Of the rules given at first, that of the nearest base class applies. Rules registered later
    come before them, the one registered last first.

    Args:
        rules: The first rules, by type of module or by its name (``"library.file.Type"``).
    """

    def __init__(self, rules: Mapping[Any, T]) -> None:
        self._first: dict[Kind, T] = dict(rules)
        self._later: list[tuple[type[nn.Module], T]] = []
        self._nearest: dict[type[nn.Module], list[tuple[type[nn.Module], T]]] = {}

    def register(self, kind: type[nn.Module], rule: T) -> None:
        """Use a rule for a type of module and its subclasses.

        Raises:
            TypeError: If ``kind`` is no such type.
        """
        if not isinstance(kind, type) or not issubclass(kind, nn.Module):
            raise TypeError(f"`kind` must be a type of module, got {described(kind)}.")
        self._later.append((kind, rule))

    def fitting(self, module: nn.Module) -> Iterator[tuple[type[nn.Module], T]]:
        """Yield the types and rules that fit a module, the one that applies first."""
        for kind, rule in reversed(self._later):
            if isinstance(module, kind):
                yield kind, rule
        yield from self._fitting_first(type(module))

    def _fitting_first(self, kind: type[nn.Module]) -> list[tuple[type[nn.Module], T]]:
        """Return the bases of a type that have one of the first rules, with the rules."""
        if kind not in self._nearest:
            self._nearest[kind] = [
                (base, self._first[own])
                for base in kind.__mro__
                for own in (base, f"{base.__module__}.{base.__qualname__}")
                if own in self._first
            ]
        return self._nearest[kind]

    def rule(self, module: nn.Module) -> T | None:
        """Return the rule that applies to a module, or ``None``."""
        for kind, rule in reversed(self._later):
            if isinstance(module, kind):
                return rule
        first = self._fitting_first(type(module))
        return first[0][1] if first else None

    def is_registered(self, module: nn.Module) -> bool:
        """Return whether a rule that was registered later applies to a module."""
        return bool(self._later) and any(isinstance(module, kind) for kind, _ in self._later)

    def __iter__(self) -> Iterator[tuple[Kind, T]]:
        yield from self._first.items()
        yield from self._later

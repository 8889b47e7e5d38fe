"""Walks over the modules and parameters of a model, of which every step makes some.

They find what ``named_modules`` and ``named_parameters`` do, in the same order, without a Python
generator for each module, which takes two to three times as long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import is_

from torch import nn


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of a model by name, each once; that of the model itself is empty."""
    seen: set[nn.Module] = set()
    found: dict[str, nn.Module] = {}
    coming: list[tuple[str, nn.Module]] = [("", model)]
    while coming:
        name, module = coming.pop()
        if module in seen:
            continue
        seen.add(module)
        found[name] = module
        if module._modules:
            prefix = f"{name}." if name else ""
            for key, child in reversed(module._modules.items()):
                if child is not None:
                    coming.append((prefix + key, child))
    return found


def parameters_in(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    """Return the parameters that modules have themselves, each once."""
    found: dict[int, nn.Parameter] = {}
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                found.setdefault(id(parameter), parameter)
    return list(found.values())


def named_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a model by name, each once."""
    seen: set[int] = set()
    found: dict[str, nn.Parameter] = {}
    for name, module in named_modules(model).items():
        for key, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found


class ModelTree:
    """The modules and parameters of a model, found again only where one was added or replaced.

    Args:
        model: The model.

    Attributes:
        modules: What `named_modules` returned when `find_` was called last.
        parameters: What `named_parameters` returned then.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._entries: list[object] = []
        self._tensors: Mapping[str, object] = {}
        self.modules: Mapping[str, nn.Module] = {}
        self.parameters: Mapping[str, nn.Parameter] = {}
        self.find_()
        self._tensors = self._no_parameters()

    def replaced(self) -> str:
        """Return the name of a parameter in whose place another tensor is, or an empty one.

        A module that TorchScript saved and loaded has tensors of its own in their place.
        """
        others = self._no_parameters()
        return next((n for n, own in others.items() if own is not self._tensors.get(n)), "")

    def _no_parameters(self) -> dict[str, object]:
        """Return what is in the place of parameters without being one, by name."""
        return {n: p for n, p in self.parameters.items() if not isinstance(p, nn.Parameter)}

    def find_(self) -> bool:
        """Find modules and parameters; return whether one of them is new or at another place."""
        entries = _entries(self.modules.values())
        known = self._entries
        if entries and len(entries) == len(known) and all(map(is_, entries, known)):
            return False
        self.modules = named_modules(self._model)
        self.parameters = named_parameters(self._model)
        self._entries = _entries(self.modules.values())
        return True


def _entries(modules: Iterable[nn.Module]) -> list[object]:
    """Return names and objects of all that modules have themselves."""
    entries: list[object] = []
    for module in modules:
        if children := module._modules:
            entries += children.keys()
            entries += children.values()
        if parameters := module._parameters:
            entries += parameters.keys()
            entries += parameters.values()
    return entries

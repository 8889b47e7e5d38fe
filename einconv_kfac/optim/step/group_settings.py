"""The hyper-parameters of each parameter's group, made anew only where a group has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias

from torch import Tensor, nn

from einconv_kfac.optim.hyperparameters import GROUP_OVERRIDES, IMMUTABLE, Hyperparameters

Group: TypeAlias = Mapping[str, Any]


class SettingsByParameter:
    """The hyper-parameters of each parameter's group, by name.

    Args:
        names: Names of the parameters.
    """

    def __init__(self, names: Mapping[nn.Parameter, str]) -> None:
        self._names = names
        self._settings: Hyperparameters | None = None
        self._entries: list[object] = []
        self._found: dict[str, Hyperparameters] = {}

    def of(self, groups: Sequence[Group], settings: Hyperparameters) -> dict[str, Hyperparameters]:
        """Return the hyper-parameters by parameter name; not to be changed.

        Args:
            groups: Parameter groups.
            settings: The optimizer's hyper-parameters, which groups override.
        """
        entries = _entries(groups)
        is_known = settings is self._settings and len(entries) == len(self._entries)
        if not (is_known and all(map(is_, entries, self._entries))):
            own = [(settings.with_overrides(_numbers(group, settings)), group) for group in groups]
            self._found = {self._names[p]: each for each, group in own for p in group["params"]}
            given = {type(group.get(name)) for group in groups for name in GROUP_OVERRIDES}
            self._settings = settings if given <= IMMUTABLE else None
            self._entries = entries
        return self._found


def _entries(groups: Sequence[Group]) -> list[object]:
    """Return all objects in groups, none of which has changed as long as these are the same."""
    entries: list[object] = []
    for group in groups:
        entries += group
        entries += group.values()
        entries += group["params"]
    return entries


def _numbers(group: Group, settings: Hyperparameters) -> Group:
    """Return a parameter group without a learning rate that the host is not to read."""
    if settings.capturable and isinstance(group["lr"], Tensor):
        return {name: value for name, value in group.items() if name != "lr"}
    return group

"""The hyper-parameters of each parameter's group, made anew only where a group has changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any, TypeAlias

from torch import Tensor, nn

from einconv_kfac.curvature.arguments import shown
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
            self._found = {self._name_of(p): each for each, group in own for p in _members(group)}
            given = {type(group.get(name)) for group in groups for name in GROUP_OVERRIDES}
            self._settings = settings if given <= IMMUTABLE else None
            self._entries = entries
        return self._found

    def _name_of(self, parameter: Any) -> str:
        """Return the name of a parameter of a group."""
        name = self._names.get(parameter) if isinstance(parameter, nn.Parameter) else None
        if name is None:
            raise ValueError(
                f"`params` of a group must be parameters of `model`, got {shown(parameter)} among "
                "them. Add parameters of new layers by `add_param_group`."
            )
        return name


def _members(group: Group) -> list[Any]:
    """Return the parameters of a group.

    Raises:
        ValueError: If they are not a list.
    """
    members = group.get("params")
    if not isinstance(members, list):
        raise ValueError(f"`params` of a group must be a list, got {shown(members)}.")
    return members


def _entries(groups: Sequence[Group]) -> list[object]:
    """Return all objects in groups, none of which has changed as long as these are the same."""
    entries: list[object] = []
    for group in groups:
        entries += group
        entries += group.values()
        entries += _members(group)
    return entries


def _numbers(group: Group, settings: Hyperparameters) -> Group:
    """Return a parameter group without a learning rate that the host is not to read."""
    if settings.capturable and isinstance(group["lr"], Tensor):
        return {name: value for name, value in group.items() if name != "lr"}
    return group

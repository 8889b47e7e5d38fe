"""The hyper-parameters of parameters are those of their groups, also where groups change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from einconv_kfac.optim.hyperparameters import Hyperparameters
from einconv_kfac.optim.step.group_settings import SettingsByParameter

Groups = list[dict[str, Any]]


def groups_of(model: nn.Sequential) -> Groups:
    own = Hyperparameters().group_defaults()
    return [
        {**own, "lr": 1 / (1 + index), "params": [*part.parameters()]}
        for index, part in enumerate(model)
    ]


def _move_parameter(groups: Groups) -> None:
    groups[0]["params"].append(groups[1]["params"].pop())


CHANGES: dict[str, Callable[[Groups], object]] = {
    "number": lambda groups: groups[0].update(lr=0.25),
    "numbers exchanged": lambda groups: groups[1].update(lr=0.25, weight_decay=0.5),
    "parameter moved": _move_parameter,
    "list replaced": lambda groups: groups[1].update(params=groups[1]["params"][:1]),
    "group removed": lambda groups: groups.pop(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_groups_are_found(change: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    settings, groups = Hyperparameters(), groups_of(model)
    found = SettingsByParameter(names)
    before = found.of(groups, settings)
    assert found.of(groups, settings) is before
    CHANGES[change](groups)
    assert found.of(groups, settings) == SettingsByParameter(names).of(groups, settings)
    assert found.of(groups, settings) != before


def test_other_settings_are_found() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found, groups = SettingsByParameter(names), groups_of(model)
    found.of(groups, Hyperparameters(damping=0.5))
    assert {own.damping for own in found.of(groups, Hyperparameters(damping=2.0)).values()} == {2.0}


def test_a_tensor_that_changes_in_place_is_read_again() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found, groups = SettingsByParameter(names), groups_of(model)
    rate: Tensor = torch.tensor(0.5)
    groups[0]["lr"] = rate
    assert {own.lr for own in found.of(groups, Hyperparameters()).values()} == {0.5}
    rate.fill_(0.25)
    assert {own.lr for own in found.of(groups, Hyperparameters()).values()} == {0.25}


def test_a_forbidden_entry_is_refused_later_as_well() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    names = {parameter: name for name, parameter in model.named_parameters()}
    found, groups = SettingsByParameter(names), groups_of(model)
    found.of(groups, Hyperparameters())
    groups[0]["adaptive"] = False
    with pytest.raises(ValueError, match="must be the same for all parameters"):
        found.of(groups, Hyperparameters())

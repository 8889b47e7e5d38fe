"""Walks over a model find what torch's methods find, in the same order."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from einconv_kfac.optim.model_walk import (
    ModelTree,
    named_modules,
    named_parameters,
    parameters_in,
)


class Shared(nn.Module):
    """A model with a module and a parameter in two places, and with empty places."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
        self.again = self.first[2]
        self.tied = nn.Linear(4, 3, bias=False)
        self.register_parameter("own", nn.Parameter(torch.zeros(2)))
        self.register_parameter("absent", None)
        self.register_module("nothing", None)
        self.head = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.ParameterList([self.own])})
        self.head["a"].weight = self.tied.weight


MODELS = {
    "shared": Shared,
    "one layer": lambda: nn.Linear(2, 3),
    "transformer": lambda: nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2), 2, enable_nested_tensor=False
    ),
    "parametrized": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(2, 3)),
    "no parameters": nn.ReLU,
}


@pytest.mark.parametrize("name", MODELS)
def test_walks_are_those_of_torch(name: str) -> None:
    model = MODELS[name]()
    assert list(named_modules(model).items()) == list(model.named_modules())
    found, expected = list(named_parameters(model).items()), list(model.named_parameters())
    assert [own for own, _ in found] == [own for own, _ in expected]
    assert all(p is q for (_, p), (_, q) in zip(found, expected))
    alone = parameters_in(named_modules(model).values())
    assert [id(p) for p in alone] == [id(p) for p in model.parameters()]


def _rename(model: nn.Sequential) -> None:
    model._modules["other"] = model._modules.pop("2")


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "layer replaced": lambda model: model.__setitem__(2, nn.Linear(4, 4)),
    "layer added": lambda model: model.append(nn.Linear(4, 2)),
    "layer added inside": lambda model: model[1].append(nn.Linear(4, 2)),
    "layer removed": lambda model: model.pop(2),
    "layer renamed": _rename,
    "parameter replaced": lambda model: setattr(model[0], "bias", nn.Parameter(torch.zeros(4))),
    "parameter removed": lambda model: setattr(model[0], "bias", None),
    "parameter added": lambda model: setattr(model[0], "scale", nn.Parameter(torch.zeros(4))),
    "parameter shared": lambda model: setattr(model[2], "weight", model[0].weight),
    "nothing": lambda model: None,
}


@pytest.mark.parametrize("change", CHANGES)
def test_tree_finds_what_was_changed(change: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU()), nn.Linear(4, 4))
    tree = ModelTree(model)
    CHANGES[change](model)
    assert tree.find_() == (change != "nothing")
    assert {n: id(m) for n, m in tree.modules.items()} == {
        n: id(m) for n, m in named_modules(model).items()
    }
    assert {n: id(p) for n, p in tree.parameters.items()} == {
        n: id(p) for n, p in named_parameters(model).items()
    }
    assert not tree.find_()

"""The layers that are found in a model, and their fields."""

from __future__ import annotations

import copy

import torch
from torch import nn

from einconv_kfac.curvature import find_layers


def test_frozen_parts() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2, bias=False))
    model[0].weight.requires_grad_(False)
    model[1].bias.requires_grad_(False)
    layers = find_layers(model, every=True)
    assert [layer.parameters for layer in layers] == [("1.weight",), ("2.weight",)]
    assert [layer.name for layer in find_layers(model)] == ["1", "2"]
    assert [layer.name for layer in find_layers(nn.Embedding(3, 2))] == [""]


def test_parametrized_layers_are_not_covered() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2))
    assert [layer.name for layer in find_layers(model)] == ["1"]


def test_modules_that_share_a_weight_are_one_layer() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    model[2].weight, model[2].bias = model[0].weight, model[0].bias
    (layer,) = find_layers(model)
    assert layer.modules == (model[0], model[2])
    assert layer.module is model[0]
    assert (layer.weight, layer.bias) == ("0.weight", "0.bias")
    assert layer.parameters == ("0.weight", "0.bias")
    assert {name: t.shape for name, t in layer.zeros().items()} == {
        "0.weight": torch.Size([3, 3]),
        "0.bias": torch.Size([3]),
    }


def test_a_copy_of_a_layer_refers_to_the_copied_module() -> None:
    (layer,) = find_layers(nn.Sequential(nn.Linear(3, 2, bias=False)))
    copied = copy.deepcopy(layer)
    assert copied.module is copied.modules[0] is not layer.module
    assert copied.parameters == ("0.weight",)
    assert copied.bias is None


def test_the_output_projection_of_attention_needs_the_rule_of_attention() -> None:
    model = nn.MultiheadAttention(4, 2)
    assert [layer.name for layer in find_layers(model)] == ["", "out_proj"]
    model.in_proj_weight.requires_grad_(False)
    assert [layer.name for layer in find_layers(model)] == ["out_proj"]
    model.forward = lambda *args: args  # type: ignore[method-assign]
    assert not find_layers(model)

"""Weights that are a parameter times a constant, against Jacobians and blocks by torch."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from constant_products import (
    MaskedConv,
    MaskedLinear,
    PixelConv,
    ScaledConv,
    ScaledLinear,
    mask_like,
)
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import prune

from einconv_kfac.curvature import coverage, find_layers
from einconv_kfac.curvature.estimation.capture import LayerCapture
from einconv_kfac.curvature.layers.coverage import layer_coverage

LINEAR, IMAGES, SIGNALS = (3, 4), (2, 4, 5, 6), (2, 4, 7)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "pruned": (lambda: prune.random_unstructured(nn.Linear(4, 3), "weight", 0.4), LINEAR),
    "pruned filters": (
        lambda: prune.ln_structured(nn.Conv2d(4, 6, 2, groups=2), "weight", 0.4, 2, 0),
        IMAGES,
    ),
    "masked": (lambda: MaskedLinear(4, 3), LINEAR),
    "masked convolution": (lambda: MaskedConv(4, 6, (3, 2), 2, (1, 0), groups=2), IMAGES),
    "circular": (lambda: MaskedConv(4, 2, 3, padding=1, padding_mode="circular"), IMAGES),
    "words": (lambda: MaskedConv(4, 2, 3, padding="same", dilation=2), IMAGES),
    "in place": (lambda: PixelConv(4, 2, 3, padding=1), IMAGES),
    "scaled": (lambda: ScaledLinear(4, 3), LINEAR),
    "scaled bias": (lambda: ScaledLinear(4, 3, 0.4, 0.1), LINEAR),
    "scaled convolution": (lambda: ScaledConv(4, 2), SIGNALS),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_and_steps_are_those_of_the_pseudo_inverse(name: str) -> None:
    torch.manual_seed(0)
    build, shape = CASES[name]
    module = build().double()
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    model = nn.Sequential(module)
    (layer,) = find_layers(model, computed=True)
    weight = layer.computed
    assert weight is not None
    x = torch.randn(shape, dtype=torch.float64)
    with LayerCapture([layer]) as capture:
        y = module(x)
        (call,) = capture.calls
    (own,) = weight.tensors().values()
    ones = torch.ones_like(own)
    constant = weight.value({weight.parameters[0]: ones})
    matrix = layer.layout.to_matrix(weighted(layer, weight.value({})))
    a = call.x
    columns = layer.rule.inputs(module, a, call.y_shape)
    if layer.bias is not None:
        columns = torch.cat([columns, torch.ones_like(columns[:, :, :1])], 2)
    outputs = matrix @ columns
    torch.testing.assert_close(outputs, layer.rule.outputs(module, y.detach()))
    u = torch.randn_like(own)
    j = torch.diag(constant.flatten())
    inverse = torch.linalg.pinv(j)
    first = weight.parameters[0]
    torch.testing.assert_close(weight.change({}, {first: u}).flatten(), j @ u.flatten())
    torch.testing.assert_close(weight.gradient({first: u}).flatten(), inverse @ u.flatten())
    torch.testing.assert_close(weight.steps(u)[first].flatten(), inverse @ u.flatten())
    values = torch.linalg.svdvals(j)
    torch.testing.assert_close(weight.stretch(), values[values > 0].square().mean())


def weighted(layer: Any, weight: Tensor) -> dict[str, Tensor]:
    """Return the parameters of a layer's matrix by name."""
    found = {name: p.detach() for name, p in layer.tensors().items()}
    values, _ = layer.effective(found, {})
    return {**found, **values, layer.layout.weight: weight}


def test_small_entries_have_bounded_steps() -> None:
    module = ScaledLinear(4, 3).double()
    module.scale = torch.ones(3, 4, dtype=torch.float64)  # type: ignore[assignment]
    module.scale[0, 0] = 1e-9  # type: ignore[index]
    (layer,) = find_layers(module, computed=True)
    assert layer.computed is not None
    ones = torch.ones(3, 4, dtype=torch.float64)
    step = layer.computed.steps(ones)["weight"]
    assert float(step[0, 0].abs()) < 1e-6
    torch.testing.assert_close(step[1:], ones[1:])


def test_what_is_hidden_altogether() -> None:
    module = MaskedLinear(4, 3)
    module.mask.zero_()
    (layer,) = find_layers(module, computed=True)
    assert layer.computed is not None
    assert not layer.computed.steps(torch.ones(3, 4))["weight"].any()
    assert float(layer.computed.stretch()) == 1


class _Own(nn.Linear):
    """A layer with a forward pass that a test gives."""

    def __init__(self, action: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(4, 4)
        self.action, self.other = action, nn.Parameter(torch.ones(4, 4))
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.action(self, x)


FORWARDS: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "itself": (lambda own, x: functional.linear(2 * x, own.weight, own.bias) ** 2, True),
    "divided": (lambda own, x: functional.linear(x, own.weight / 3, own.bias), True),
    "cast": (lambda own, x: functional.linear(x, (2 * own.weight).clone(), own.bias), True),
    "another parameter": (lambda own, x: functional.linear(x, own.weight * own.other), False),
    "not linear": (lambda own, x: functional.linear(x, own.weight.exp()), False),
    "transposed": (lambda own, x: functional.linear(x, own.weight.T * 2), False),
    "a sum": (lambda own, x: functional.linear(x, own.weight + 1), False),
    "reciprocal": (lambda own, x: functional.linear(x, 1 / own.weight), False),
    "twice": (lambda own, x: functional.linear(functional.linear(x, own.weight), own.other), False),
    "a product": (lambda own, x: x @ own.weight.T, False),
    "none": (lambda own, x: x, False),
    "another input": (lambda own, x: functional.linear(x["x"], own.weight), False),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_what_is_covered(name: str) -> None:
    action, is_covered = FORWARDS[name]
    module = _Own(action)
    state = torch.get_rng_state()
    layers = find_layers(nn.Sequential(module), computed=True)
    assert torch.equal(state, torch.get_rng_state())
    assert module.calls == 0
    assert bool(layers) == is_covered
    (reason,) = [
        row.reason for row in layer_coverage(module, computed=True) if row.parameter == "weight"
    ]
    assert bool(reason) != is_covered
    assert not find_layers(nn.Sequential(module))
    assert all(row.reason for row in coverage(module))


def test_a_trial_leaves_a_module_as_it_is() -> None:
    module = PixelConv(2, 3, 3)
    module.register_buffer("count", torch.zeros(()))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    (layer,) = find_layers(module, computed=True)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert layer.computed is not None
    mask = layer.computed.value({"weight": torch.ones_like(module.weight)})
    assert torch.equal(mask, mask_like(module.weight))
    assert module.weight.is_leaf
    assert not module._forward_hooks


def test_biases_that_are_computed_otherwise_are_left_out() -> None:
    class Exponential(ScaledLinear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight * self.scale, self.bias.exp())

    (layer,) = find_layers(Exponential(4, 3), computed=True)
    assert layer.parameters == ("weight",)
    (layer,) = find_layers(ScaledLinear(4, 3), computed=True)
    assert layer.parameters == ("weight", "bias")


class Noting(nn.Module):
    """A linear layer that notes its inputs, and draws numbers that it does not use."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4))
        self.seen: list[torch.Size] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape)
        random.random()
        np.random.rand()
        torch.rand(1)
        return functional.linear(x, self.weight)


def random_states() -> tuple[Any, ...]:
    name, keys, *position = np.random.get_state()
    return random.getstate(), name, tuple(keys), tuple(position), tuple(torch.get_rng_state())


def test_a_trial_leaves_nothing_behind() -> None:
    module = Noting()
    before = random_states()
    (found,) = find_layers(nn.Sequential(module), computed=True)
    assert found.computed is not None
    assert random_states() == before
    assert module.seen == []
    alive = weakref.ref(module)
    del found, module
    gc.collect()
    assert alive() is None

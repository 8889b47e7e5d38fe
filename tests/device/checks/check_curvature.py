"""Curvature of models, every layer rule, convolutions and autocast on the device."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from simulated_device import held, simulated, to_device
from small_training import batches, network, optimizer
from torch import Generator, nn

from einconv_kfac.curvature import kronecker_factors
from einconv_kfac.curvature.blocks.cholesky import invert_damped
from einconv_kfac.curvature.layers.layer_registry import built_in_rules
from einconv_kfac.modules import ConvNd, ConvTransposeNd

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
EXAMPLES = {
    f"{type(rule).__name__}-{number}": example
    for rule in {type(rule): rule for rule in built_in_rules().values()}.values()
    for number, example in enumerate(rule.examples)
}

LAUNCHES = {
    **{"AttentionRule": 545, "BatchNormRule": 255, "ConvRule": 252, "EmbeddingRule": 115},
    **{"EmbeddingBagRule": 90, "GraphLinearRule": 94, "GroupNormRule": 163, "LinearRule": 132},
    **{"InstanceNormRule": 238, "LayerNormRule": 135, "RecurrentRule": 408, "RMSNormRule": 140},
    **{"RootMeanSquareRule": 144, "SameConvRule": 430, "TransformersLinearRule": 110},
    **{"TransposedConvRule": 765},
}
"""Launches of the curvature of a rule's example, by its exact Fisher; lower when undercut."""

OTHER_LAUNCHES = 500
"""Those of rules that are not listed."""

WAITS = {"AttentionRule": 13}
OTHER_WAITS = 8
"""Waits for the whole model and one batch: of the check of the examples, not of the factors."""


@pytest.mark.parametrize(
    ("kind", "fisher"),
    [("kfac", "exact"), ("kfac", "mc"), ("kfac", "empirical"), ("ekfac", "mc"), ("diagonal", "mc")],
)
def test_curvature_is_that_of_the_processor(kind: Any, fisher: Any) -> None:
    data, loss_fn = batches(2), nn.CrossEntropyLoss()
    model = network()
    here = kronecker_factors(model, loss_fn, data, fisher=fisher, kind=kind)
    with simulated() as record:
        moved = [(to_device(x), to_device(y)) for x, y in data]
        there = kronecker_factors(
            to_device(copy.deepcopy(model)), loss_fn, moved, fisher=fisher, kind=kind
        )
        assert not record.mixtures
        values = [held(there.trace()), held(there.logdet(0.1))]
        assert not record.mixtures
    torch.testing.assert_close(values, [here.trace(), here.logdet(0.1)], **TOLERANCE)


@pytest.mark.parametrize("name", EXAMPLES)
def test_every_layer_rule(name: str) -> None:
    example = EXAMPLES[name]
    torch.manual_seed(0)
    model = example.build().double()
    x = example.inputs(Generator().manual_seed(0))
    y = torch.zeros_like(model(x))
    options: dict[str, Any] = {"fisher": "exact"}
    here = kronecker_factors(model, nn.MSELoss(), [(x, y)], **options)
    with simulated() as record:
        moved = [(to_device(x), to_device(y))]
        model, rule = to_device(model), name.partition("-")[0]
        record.reset()
        there = kronecker_factors(model, nn.MSELoss(), moved, **options)
        assert not record.mixtures
        assert record.launches <= LAUNCHES.get(rule, OTHER_LAUNCHES)
        assert record.waited <= WAITS.get(rule, OTHER_WAITS), record.waits
    torch.testing.assert_close(held(there.trace()), here.trace(), **TOLERANCE)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", [ConvNd, ConvTransposeNd])
def test_convolutions_are_those_of_the_processor(kind: Any, n: int, groups: int) -> None:
    torch.manual_seed(0)
    layer = kind(n, 4, 6, 3, padding=1, stride=2, groups=groups).double()
    x = torch.randn(2, 4, *[4] * n, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    with simulated() as record:
        there, moved = to_device(copy.deepcopy(layer)), to_device(x).requires_grad_()
        output = there(moved)
        output.square().sum().backward()
        assert not record.mixtures
        assert not record.waits
        grads = held([moved.grad, there.weight.grad])
    torch.testing.assert_close(held(output.detach()), y.detach(), **TOLERANCE)
    torch.testing.assert_close(grads, [x.grad, layer.weight.grad], **TOLERANCE)


@pytest.mark.parametrize(
    ("adaptive", "dtype"), [(True, torch.bfloat16), (False, torch.float16), (False, torch.bfloat16)]
)
def test_steps_with_autocast(adaptive: bool, dtype: torch.dtype) -> None:
    options = {} if adaptive else {"lr": 0.1}
    with simulated() as record:
        model = to_device(network(torch.float32))
        opt = optimizer(model, adaptive=adaptive, **options)
        losses = []
        for x, y in batches(1, torch.float32) * (4 if adaptive else 6):
            opt.zero_grad()
            with torch.autocast("cuda", dtype):
                loss = opt.loss_fn(model(to_device(x)), to_device(y))
            loss.backward()
            opt.step()
            losses.append(float(held(loss.detach())))
        assert not record.mixtures
    assert losses[-1] < 0.8 * losses[0]


def test_inverses_that_fail_are_made_again_as_on_the_processor() -> None:
    """One factor of a stack is singular in float32; the others keep their inverses."""
    good, singular = torch.eye(4).unsqueeze(0), torch.ones(1, 4, 4)
    pairs = [(good, good), (singular, good), (2 * good, good)]
    names, damping = ["'a'", "'b'", "'c'"], 1e-16
    expected = invert_damped(pairs, [damping] * 3, names, damping_increases=2)
    assert [own.retries > 0 for own in expected] == [False, True, False]
    with simulated():
        there = [(to_device(a), to_device(b)) for a, b in pairs]
        found = invert_damped(there, [damping] * 3, names, damping_increases=2)
        assert [own.retries for own in found] == [own.retries for own in expected]
        for own, other in zip(expected, found):
            for inverse, moved in zip(
                (*own.inverses, own.conditions()), (*other.inverses, other.conditions())
            ):
                torch.testing.assert_close(held(moved), inverse, rtol=1e-5, atol=1e-6)

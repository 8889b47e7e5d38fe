"""Every rule in ``layers/rules/`` on its own examples, against automatic differentiation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call, jacrev

from einconv_kfac.curvature import LayerRule, find_layers, kronecker_factors
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_registry import built_in_rules, layer_rule
from einconv_kfac.curvature.layers.layer_rule import LayerExample

TOLERANCE = {"rtol": 1e-8, "atol": 1e-10}
RULES = built_in_rules()
EXAMPLES = {
    f"{type(rule).__name__}-{number}": (rule, example)
    for rule in {type(rule): rule for rule in RULES.values()}.values()
    for number, example in enumerate(rule.examples)
}


@pytest.fixture(params=EXAMPLES)
def case(request: pytest.FixtureRequest) -> tuple[LayerRule, LayerExample]:
    return EXAMPLES[request.param]


def problem(rule: LayerRule, example: LayerExample) -> tuple[nn.Module, Tensor, Layer]:
    """A model, an input, and the layer of the model that the rule covers."""
    torch.manual_seed(0)
    model = example.build().double()
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 1.5)  # no bias zero, no variance one
    layers = find_layers(model, every=True)
    (layer,) = [layer for layer in layers if type(layer.rule) is type(rule)]
    return model, example.inputs(Generator().manual_seed(0)), layer


def recorded(model: nn.Module, x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The model's output, and the input and the output of the layer's only call."""
    calls: list[tuple[Tensor, Tensor]] = []
    undo = layer.rule.watch(layer.module, lambda *call: calls.append(call))
    output = model(x)
    undo()
    ((inputs, y),) = calls
    model(x)
    assert len(calls) == 1
    return output, inputs, y


def test_every_rule_has_examples() -> None:
    for kind, rule in RULES.items():
        assert rule.examples or rule.refusal(nn.Identity()), type(rule)
        assert kind in rule.kinds
    for rule, example in EXAMPLES.values():
        covered = [layer_rule(module) for module in example.build().modules()]
        assert any(type(found) is type(rule) for found in covered)


def test_inputs_are_batches(case: tuple[LayerRule, LayerExample]) -> None:
    model, x, layer = problem(*case)
    output, inputs, _ = recorded(model, x, layer)
    assert layer.rule.accepts(layer.module, inputs)
    assert len(output) == len(inputs) == len(x)


def test_the_layer_is_a_linear_map_of_its_inputs(case: tuple[LayerRule, LayerExample]) -> None:
    """``W a + b`` is the output, as far as the parameters are trained."""
    model, x, layer = problem(*case)
    _, inputs, y = recorded(model, x, layer)
    rule, module = layer.rule, layer.module
    if getattr(module, "padding_idx", None) is not None:
        x.clamp_(max=module.padding_idx - 1)  # the row of the padding is not trained
        _, inputs, y = recorded(model, x, layer)
    a = rule.inputs(module, inputs, y.shape)
    matrix = layer.to_matrix(dict(model.named_parameters()))
    a = a if layer.bias is None else torch.cat([a, torch.ones_like(a[:, :, :1])], 2)
    torch.testing.assert_close(matrix @ a, rule.outputs(module, y), **TOLERANCE)
    assert rule.positions(module, y.shape) == a.shape[-1]


def test_gradients_of_the_weight_are_sums_of_outer_products(
    case: tuple[LayerRule, LayerExample],
) -> None:
    """``sum_{n,s} g a^T`` is what autograd returns for a random gradient at the output."""
    model, x, layer = problem(*case)
    output, inputs, y = recorded(model, x, layer)
    root = torch.randn(output.shape, generator=Generator().manual_seed(1), dtype=output.dtype)
    own = [dict(model.named_parameters())[name] for name in layer.parameters]
    (dy, *gradients) = torch.autograd.grad(output, [y, *own], root)
    a = layer.rule.inputs(layer.module, inputs, y.shape)
    a = a if layer.bias is None else torch.cat([a, torch.ones_like(a[:, :, :1])], 2)
    g = layer.rule.outputs(layer.module, dy)
    expected = layer.to_matrix(dict(zip(layer.parameters, gradients)))
    torch.testing.assert_close(torch.einsum("ngas,ngbs->gab", g, a), expected, **TOLERANCE)
    back = layer.from_matrix(expected)
    assert all(torch.equal(back[n], t) for n, t in zip(layer.parameters, gradients))


def test_joined_calls_have_the_mean_of_their_factors(case: tuple[LayerRule, LayerExample]) -> None:
    model, x, layer = problem(*case)
    _, inputs, y = recorded(model, x, layer)
    rule, module = layer.rule, layer.module
    if not rule.may_join(module, inputs):
        pytest.skip("calls are computed one by one")
    calls, gradients = [inputs, 2 * inputs.flip(0)], [y.detach(), y.detach() ** 2]
    joined, y_shape = torch.cat(calls), torch.Size([2 * len(y), *y.shape[1:]])
    a = [rule.input_factor(module, own, y.shape, "expand", True) for own in calls]
    b = [rule.output_factor(module, own, "expand") for own in gradients]
    together = rule.input_factor(module, joined, y_shape, "expand", True)
    torch.testing.assert_close(together, sum(a) / 2, **TOLERANCE)
    together = rule.output_factor(module, torch.cat(gradients), "expand")
    torch.testing.assert_close(together, sum(b) / 2, **TOLERANCE)


@pytest.mark.parametrize("approximation", ["expand", "reduce"])
@pytest.mark.parametrize("bias", [True, False])
def test_factors_are_those_of_the_columns(
    case: tuple[LayerRule, LayerExample], bias: bool, approximation: Any
) -> None:
    """``A`` and ``B`` by their definition, and added to what is there."""
    model, x, layer = problem(*case)
    _, inputs, y = recorded(model, x, layer)
    rule, module = layer.rule, layer.module
    a, g = rule.inputs(module, inputs, y.shape), rule.outputs(module, y.detach())
    a = torch.cat([a, torch.ones_like(a[:, :, :1])], 2) if bias else a
    if approximation == "reduce":
        a, g = a.mean(-1, keepdim=True), g.sum(-1, keepdim=True)
    factors = {
        "A": torch.einsum("ngas,ngbs->gab", a, a) / len(a),
        "B": torch.einsum("ngas,ngbs->gab", g, g) / (len(g) * g.shape[-1]),
    }

    def input_factor(**into: Any) -> Tensor:
        return rule.input_factor(module, inputs, y.shape, approximation, bias, **into)

    def output_factor(**into: Any) -> Tensor:
        return rule.output_factor(module, y.detach(), approximation, **into)

    for expected, factor in zip(factors.values(), (input_factor, output_factor)):
        torch.testing.assert_close(factor(), expected, **TOLERANCE)
        total = torch.full_like(expected, 2.0)
        factor(out=total, beta=0.5, alpha=3.0)
        torch.testing.assert_close(total, 1 + 3 * expected, **TOLERANCE)

    def input_diagonal(**into: Any) -> Tensor:
        return rule.input_diagonal(module, inputs, y.shape, approximation, bias, **into)

    def output_diagonal(**into: Any) -> Tensor:
        return rule.output_diagonal(module, y.detach(), approximation, **into)

    for matrix, entries in zip(factors.values(), (input_diagonal, output_diagonal)):
        expected = matrix.diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(entries(), expected, **TOLERANCE)
        total = torch.full_like(expected, 2.0)
        entries(out=total, beta=0.5, alpha=3.0)
        torch.testing.assert_close(total, 1 + 3 * expected, **TOLERANCE)
    sums = rule.inputs(module, inputs, y.shape).sum(-1, keepdim=True)
    torch.testing.assert_close(rule.input_sums(module, inputs, y.shape), sums, **TOLERANCE)


def diagonal(model: nn.Module, x: Tensor, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The diagonal of the GGN of half the sum of squares, by the Jacobian of the whole model."""
    own = {name: p.detach() for name, p in model.named_parameters() if name in names}

    def output(parameters: dict[str, Tensor]) -> Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        result: Tensor = functional_call(model, {**buffers, **parameters}, x)
        return result.flatten()

    rows = jacrev(output, chunk_size=1)(own)  # a loop, for layers without a batching rule
    for name in names:
        yield name, rows[name].square().sum(0)


def test_diagonal_of_the_ggn_is_exact(case: tuple[LayerRule, LayerExample]) -> None:
    model, x, layer = problem(*case)
    expected = dict(diagonal(model, x, layer.parameters))
    data = [(x, torch.zeros_like(model(x)))]
    loss_fn = nn.MSELoss(reduction="sum")
    factors = kronecker_factors(model, loss_fn, data, kind="diagonal", fisher="exact")
    found = layer.from_matrix(factors[layer.name].values)
    for name in layer.parameters:
        torch.testing.assert_close(found[name], 2 * expected[name], **TOLERANCE)

"""The layers of a model that rules cover, and the reasons why other modules are not covered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_registry import is_hidden, layer_rule, overrides_forward
from einconv_kfac.curvature.layers.layer_rule import LayerRule


def find_layers(model: nn.Module, *, every: bool = False) -> list[Layer]:
    """Return the layers of a model whose weight is trained and that a rule covers.

    Args:
        model: The model.
        every: Whether to include those that the optimizer does not precondition.

    Raises:
        ValueError: If modules share a weight in ways that have no single block, or if a
            layer's parameters do not exist yet.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    layers: dict[str, Layer] = {}
    for name, module in model.named_modules():
        rule = layer_rule(module)
        if rule is None or refusal(name, module) or not (every or rule.preconditioned):
            continue
        if is_hidden(module) and not (every and _is_revealed(model, name)):
            continue
        layer = Layer(name, (module,), rule, _layout(module, rule, names))
        first = layers.setdefault(layer.weight, layer)
        if first is not layer:
            layers[layer.weight] = _merged(first, layer)
    _refuse_shared(list(layers.values()))
    return list(layers.values())


def refusal(name: str, module: nn.Module) -> str | None:
    """Return the reason why a module's parameters are not covered, or ``None`` if they are.

    Raises:
        ValueError: If they do not exist yet.
    """
    rule, own = layer_rule(module), dict(module.named_parameters(recurse=False))
    if rule is None:
        return f"no rule covers {type(module).__name__}; `register_layer` adds one"
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if any(is_lazy(parameter) for parameter in own.values()):
        raise ValueError(
            f"Parameters must exist, but those of '{name}' ({type(module).__name__}) are not "
            "initialized. Run the model on a batch first."
        )
    if overrides_forward(module):
        return (
            f"{type(module).__name__} has a forward pass of its own; `register_layer` adds a rule"
        )
    if any(parameter.is_complex() for parameter in own.values()):
        return "its parameters are complex"
    if rule.weight not in own:
        return "its weight is not a parameter of its own"
    return rule.refusal(module) if own[rule.weight].requires_grad else "its weight is frozen"


def _is_revealed(model: nn.Module, name: str) -> bool:
    """Return whether a rule covers the parent of a hidden module, and so reveals its calls."""
    parent = name.rpartition(".")[0]
    return refusal(parent, model.get_submodule(parent)) is None


def _layout(module: nn.Module, rule: LayerRule, names: Mapping[Tensor, str]) -> Layout:
    """Return the layout of a module's trained parameters, by their names in the model."""
    own = dict(module.named_parameters(recurse=False))
    weight, bias = own[rule.weight], own.get(rule.bias)
    split, order = rule.split(module)
    if bias is None or not bias.requires_grad:
        return Layout(names[weight], None, tuple(weight.shape), split, order)
    return Layout(names[weight], names[bias], tuple(weight.shape), split, order, tuple(bias.shape))


def _merged(first: Layer, second: Layer) -> Layer:
    """Return two layers that share their parameters as one."""
    if first.rule is not second.rule or first.layout != second.layout:
        raise ValueError(
            f"Modules that share a weight must be of one type and share the bias, but "
            f"'{first.name}' ({type(first.module).__name__}) and '{second.name}' "
            f"({type(second.module).__name__}), which share '{first.weight}', do not."
        )
    return Layer(first.name, (*first.modules, *second.modules), first.rule, first.layout)


def _refuse_shared(layers: Sequence[Layer]) -> None:
    """Raise if two layers train the same parameter."""
    owner: dict[str, str] = {}
    for layer in layers:
        for parameter in layer.parameters:
            if parameter in owner:
                raise ValueError(
                    f"A bias must belong to one weight, but '{layer.name}' and "
                    f"'{owner[parameter]}' share '{parameter}'."
                )
            owner[parameter] = layer.name

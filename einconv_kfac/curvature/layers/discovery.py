"""The layers of a model that rules cover, and the reasons why other modules are not covered."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.exclusion import Exclusion, excluded_modules
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_registry import is_hidden, layer_rule, overrides_forward
from einconv_kfac.curvature.layers.layer_rule import LayerRule
from einconv_kfac.curvature.layers.shared_weights import Candidate, joined, owners


def find_layers(model: nn.Module, *, every: bool = False, exclude: Exclusion = ()) -> list[Layer]:
    """Return the layers of a model whose weight is trained and that a rule covers.

    Modules that share a weight are one layer. If they have different biases, the layer has none;
    if they have no common block, there is no layer.

    Args:
        model: The model.
        every: Whether to include those that the optimizer does not precondition.
        exclude: Modules, types of modules, names of modules or patterns of names, with all that
            they contain. A layer is left out if one of its modules is.

    Raises:
        ValueError: If a layer's parameters do not exist yet, or ``exclude`` matches nothing.
    """
    layers, _ = discovered(model, every=every)
    excluded = excluded_modules(model, exclude)
    return [layer for layer in layers if excluded.isdisjoint(layer.modules)]


def discovered(model: nn.Module, *, every: bool = False) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers, and why parameters that modules share belong to none, by name.

    Raises:
        ValueError: See `find_layers`.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    candidates = []
    for name, module in model.named_modules():
        rule = layer_rule(module)
        if rule is None or refusal(name, module) or not (every or rule.preconditioned):
            continue
        if is_hidden(module) and not (every and _is_revealed(model, name)):
            continue
        candidates.append(Candidate(name, module, rule, _layout(module, rule, names)))
    return joined(candidates, owners(model, names))


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

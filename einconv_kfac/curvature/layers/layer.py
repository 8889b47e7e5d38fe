"""The layers of a model that rules cover, and the parameters that each trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.rules import (
    Approximation,
    LayerRule,
    layer_rule,
    overrides_forward,
)

__all__ = ["Approximation", "Layer", "LayerRule", "find_layers", "refusal"]


@dataclass(frozen=True)
class Layer:
    """A layer with a rule, and how its parameters form its matrices.

    Args:
        name: Its name in the model.
        modules: The modules that use its parameters; several if they share them.
        rule: The rule for their type.
        layout: Its parameters as matrices ``[g, co, d]``.
    """

    name: str
    modules: tuple[nn.Module, ...]
    rule: LayerRule
    layout: Layout

    @property
    def module(self) -> nn.Module:
        """The first module."""
        return self.modules[0]

    @property
    def weight(self) -> str:
        """Name of the weight in the model."""
        return self.layout.weight

    @property
    def bias(self) -> str | None:
        """Name of the bias, or ``None`` if it has none that is trained."""
        return self.layout.bias

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the layer's factors cover."""
        return self.layout.parameters

    def zeros(self) -> dict[str, Tensor]:
        """Return a zero tensor per parameter."""
        own = dict(self.module.named_parameters(recurse=False))
        tensors = [own[self.rule.weight]] + ([own[self.rule.bias]] if self.bias else [])
        return {name: torch.zeros_like(t) for name, t in zip(self.parameters, tensors)}

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors by parameter name as one matrix per group, ``[g, co, d]``."""
        return self.layout.to_matrix(tensors)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return matrices ``[g, co, d]`` as tensors by parameter name."""
        return self.layout.from_matrix(matrix)


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
        if isinstance(module, NonDynamicallyQuantizableLinear) and not (
            every and _is_watched(model, name)
        ):
            continue  # attention's output projection, which only the attention rule can see
        layer = Layer(name, (module,), rule, _layout(module, rule, names))
        first = layers.setdefault(layer.weight, layer)
        if first is not layer:
            layers[layer.weight] = _merged(first, layer)
    _refuse_shared(list(layers.values()))
    return list(layers.values())


def refusal(name: str, module: nn.Module) -> str | None:
    """Return why a module's parameters are not covered, or ``None`` if they are.

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
    if rule.weight not in own:
        return "its weight is not a parameter of its own"
    return rule.refusal(module) if own[rule.weight].requires_grad else "its weight is frozen"


def _is_watched(model: nn.Module, name: str) -> bool:
    """Tell whether the module that calls the one of this name is covered itself."""
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

"""Layers of modules that share parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import getattr_static

from torch import Tensor, nn

from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.computed_weight import NamedWeight
from einconv_kfac.curvature.layers.layer import Layer, Use
from einconv_kfac.curvature.layers.layer_registry import layer_rule
from einconv_kfac.curvature.layers.layer_rule import LayerRule


@dataclass(frozen=True)
class Candidate:
    """A module that a rule covers.

    Args:
        name: Its name in the model.
        module: The module.
        rule: Its rule.
        layout: Its parameters as matrices.
        computed: How the weight is computed from parameters that no other module has.
        computed_bias: How the bias is computed from its parameter.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    layout: Layout
    computed: NamedWeight | None = None
    computed_bias: NamedWeight | None = None

    def __str__(self) -> str:
        return f"'{self.name}' ({type(self.module).__name__})"


def owners(model: nn.Module, names: Mapping[Tensor, str]) -> dict[str, dict[nn.Module, str]]:
    """Return the modules that use each parameter, with their names, by the parameter's name.

    A module counts if a rule covers its type, or if it can be called and contains no others.
    Other modules hold parameters of those that they contain under a second name.
    """
    found: dict[str, dict[nn.Module, str]] = defaultdict(dict)
    for name, module in model.named_modules():
        is_container = any(True for _ in module.children()) or not _can_be_called(module)
        if layer_rule(module) is None and is_container:
            continue
        for parameter in module.parameters(recurse=False):
            found[names[parameter]][module] = name
    return found


def _can_be_called(module: nn.Module) -> bool:
    """Return whether a module has a forward pass, which lists of parameters do not."""
    return getattr_static(type(module), "forward") is not nn.Module.forward


def joined(
    candidates: Sequence[Candidate], users: Mapping[str, Mapping[nn.Module, str]]
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers of modules, and the reasons why parameters that they share have none.

    Modules of one weight are one layer if their matrices are equal or transposes of each other. A
    bias is part of the layer if all of them, and no others, use it.

    Args:
        candidates: The modules.
        users: The modules that use each parameter, see `owners`.
    """
    groups: dict[str, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.layout.weight].append(candidate)
    layers: list[Layer] = []
    reasons: dict[str, str] = {}
    for weight, group in groups.items():
        members = {own.module for own in group}
        strangers = [name for module, name in users[weight].items() if module not in members]
        biases = {own.layout.bias: own for own in group if own.layout.bias is not None}
        reason = _unseen(strangers) or _different(group)
        if reason:
            reasons |= dict.fromkeys((weight, *biases), reason)
            continue
        unfit = {name: why for name in biases if (why := _unfit(name, group, users[name]))}
        reasons |= unfit
        layers.append(_layer(group, with_bias=bool(biases) and not unfit))
    return layers, reasons


def _layer(group: Sequence[Candidate], *, with_bias: bool) -> Layer:
    """Return the layer of modules that share a weight."""
    first = group[0]
    layout = first.layout if with_bias else first.layout.without_bias()
    uses = tuple(Use(own.module, own.rule, _is_transposed(first, own)) for own in group)
    modules = tuple(own.module for own in group)
    bias = first.computed_bias if with_bias else None
    return Layer(first.name, modules, first.rule, layout, uses, first.computed, bias)


def _unseen(names: Sequence[str]) -> str | None:
    """Return the reason for a parameter that other modules use."""
    return f"it is shared with '{names[0]}', whose use of it no rule covers" if names else None


def _different(group: Sequence[Candidate]) -> str | None:
    """Return the reason for a weight that modules use as different matrices."""
    first = group[0]
    for own in group[1:]:
        is_same = own.layout.without_bias() == first.layout.without_bias()
        if not (is_same or _is_transposed(first, own)):
            return f"{first} and {own} share it but use it as different matrices"
    return None


def _unfit(bias: str, group: Sequence[Candidate], users: Mapping[nn.Module, str]) -> str | None:
    """Return the reason for a bias that is not used exactly where the weight is."""
    without = [own for own in group if own.layout.bias != bias]
    if without:
        return f"{without[0]} shares the weight, but not this bias"
    members = {own.module for own in group}
    others = [name for module, name in users.items() if module not in members]
    return f"it is shared with '{others[0]}', which has another weight" if others else None


def _is_transposed(first: Candidate, second: Candidate) -> bool:
    """Return whether the matrices of the second module are the transposes of the first's."""
    if second is first:
        return False
    one, other = first.layout.without_bias(), second.layout.without_bias()
    return one != other and other.is_transpose_of(one)

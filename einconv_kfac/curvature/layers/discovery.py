"""The layers of a model that rules cover, and the reasons why other modules are not covered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from einconv_kfac.curvature.arguments import flag
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.layers.computed.product import ProductWeight
from einconv_kfac.curvature.layers.computed_weight import ComputedWeight, NamedWeight
from einconv_kfac.curvature.layers.computed_weights import computed_weight, is_standardized
from einconv_kfac.curvature.layers.exclusion import Exclusion, excluded_modules
from einconv_kfac.curvature.layers.inner_calls import BIAS, KNOWN, WEIGHT
from einconv_kfac.curvature.layers.inner_search import inner_rule
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_registry import is_hidden, layer_rule, overrides_forward
from einconv_kfac.curvature.layers.layer_rule import LayerRule
from einconv_kfac.curvature.layers.shared_weights import Candidate, joined, owners
from einconv_kfac.curvature.module_arguments import check_module

SHARED = "another module computes its weight from it as well"


def find_layers(
    model: nn.Module, *, every: bool = False, exclude: Exclusion = (), computed: bool = False
) -> list[Layer]:
    """Return the layers of a model whose weight is trained and that a rule covers.

    Modules that share a weight are one layer. If they have different biases, the layer has none;
    if they have no common block, there is no layer.

    Args:
        model: The model.
        every: Whether to include those that the optimizer does not precondition.
        exclude: Modules, types of modules, names of modules or patterns of names, with all that
            they contain. A layer is left out if one of its modules is.
        computed: Whether to include those whose weight is computed from parameters, as by weight
            normalization. Their matrices are those of the weight.

    Raises:
        ValueError: If a layer's parameters do not exist yet, or ``exclude`` matches nothing.
    """
    check_module(model, "find_layers(model)")
    given = flag("every", every), flag("computed", computed)
    layers, _ = discovered(model, every=given[0], strict=True, computed=given[1])
    excluded = excluded_modules(model, exclude)
    return [layer for layer in layers if excluded.isdisjoint(layer.modules)]


def discovered(
    model: nn.Module, *, every: bool = False, strict: bool = False, computed: bool = False
) -> tuple[list[Layer], dict[str, str]]:
    """Return the layers, and why parameters that modules share belong to none, by name.

    Args:
        model: See `find_layers`.
        every: See `find_layers`.
        strict: Whether to raise if a layer's parameters do not exist yet.
        computed: See `find_layers`.

    Raises:
        ValueError: See `find_layers`.
    """
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    counts = Counter(p for module in model.modules() for p in module._parameters.values())
    candidates: list[Candidate] = []
    reasons: dict[str, str] = {}
    for name, module in model.named_modules():
        rule = _rule(model, name, module, computed=computed)
        if rule is None or not (every or rule.preconditioned):
            continue
        if strict:
            _check_initialized(name, module)
        parts = rule.parts(module)
        for part in parts:
            if refusal(name, module, part, computed=computed):
                continue
            own = name if len(parts) == 1 else f"{name}.{part.weight}".lstrip(".")
            weight = _named(name, module, part, names) if computed else None
            if weight is not None and any(counts[p] > 1 for p in weight.tensors().values()):
                reasons |= dict.fromkeys(weight.parameters, SHARED)
                continue
            layout = _layout(module, part, names, weight)
            bias = None if layout.bias is None else _named_bias(module, part, layout.bias)
            candidates.append(Candidate(own, module, part, layout, weight, bias))
    layers, others = joined(candidates, owners(model, names))
    return layers, reasons | others


def refusal(
    name: str, module: nn.Module, part: LayerRule | None = None, *, computed: bool = False
) -> str | None:
    """Return the reason why a module's parameters are not covered, or ``None`` if they are.

    Args:
        name: Its name in the model.
        module: The module.
        part: The rule of one of its weights; its own rule by default.
        computed: Whether its weight may be computed from parameters in a known way.
    """
    rule, own = part or layer_rule(module), dict(module.named_parameters(recurse=False))
    if rule is None:
        return f"no rule covers {type(module).__name__}; `register_layer` adds one"
    weight = _computed(module, rule) if computed else None
    if weight is None and (unlike := _unlike(module)):
        return unlike
    if weight is not None:
        own |= weight.parameters()
    if any(is_lazy(parameter) for parameter in own.values()):
        return "its parameters are not initialized; run the model on a batch first"
    is_complex = any(parameter.is_complex() for parameter in own.values())
    refused = None if weight is not None and is_standardized(module) else rule.refusal(module)
    reason = "its parameters are complex" if is_complex else refused
    if reason is None and overrides_forward(module) and not rule.sees_inner_calls:
        kind = type(module).__name__
        is_own = "forward" not in vars(module)
        own_pass = f"{kind} has a forward pass of its own; `register_layer` adds a rule"
        return own_pass if is_own else "its forward pass was replaced"
    names = (rule.weight,) if weight is None else weight.attributes
    if not own.keys() >= set(names):
        return "its weight is not a parameter of its own"
    return reason if all(own[name].requires_grad for name in names) else "its weight is frozen"


def _unlike(module: nn.Module) -> str | None:
    """Return the reason for a weight that is no parameter, or ``None``."""
    if is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    if is_standardized(module):
        return "its weight is standardized in the forward pass: the block is no Kronecker product"
    return None


def _check_initialized(name: str, module: nn.Module) -> None:
    """Raise a ``ValueError`` if a layer's parameters do not exist yet."""
    if any(is_lazy(parameter) for parameter in module.parameters(recurse=False)):
        raise ValueError(
            f"Parameters must exist, but those of '{name}' ({type(module).__name__}) are not "
            "initialized. Run the model on a batch first."
        )


def _rule(model: nn.Module, name: str, module: nn.Module, *, computed: bool) -> LayerRule | None:
    """Return the rule of a module, where weights may be computed that of an inner call."""
    rule = layer_rule(module)
    if rule is not None and is_hidden(module):
        return _revealed(model, name, module)
    may_be_inner = rule is None or (rule.may_compute_weight and overrides_forward(module))
    if not (computed and may_be_inner) or is_standardized(module):
        return rule
    return inner_rule(module) or rule


def _revealed(model: nn.Module, name: str, module: nn.Module) -> LayerRule | None:
    """Return the rule of a hidden module, if a rule covers the parent that bypasses its hooks."""
    parent = model.get_submodule(name.rpartition(".")[0])
    rule = layer_rule(parent)
    if rule is None or not isinstance(module, rule.revealed) or overrides_forward(parent):
        return None
    return rule.reveal(parent, module) or layer_rule(module)


def _computed(module: nn.Module, rule: LayerRule) -> ComputedWeight | None:
    """Return how a module computes its weight, where its rule allows that."""
    if rule.sees_inner_calls:
        return ProductWeight(module, WEIGHT, KNOWN[module].weight)
    return computed_weight(module, rule.weight) if rule.may_compute_weight else None


def _named(
    name: str, module: nn.Module, rule: LayerRule, names: Mapping[Tensor, str]
) -> NamedWeight | None:
    """Return how a module computes its weight, with names in the model."""
    weight = _computed(module, rule)
    if weight is None:
        return None
    parameters = tuple(names[parameter] for parameter in weight.parameters().values())
    return NamedWeight(f"{name}.{rule.weight}".lstrip("."), parameters, weight)


def _named_bias(module: nn.Module, rule: LayerRule, name: str) -> NamedWeight | None:
    """Return how a module computes its bias, given the name of its parameter in the model."""
    constant = KNOWN[module].bias if rule.sees_inner_calls else None
    if constant is None:
        return None
    return NamedWeight(name, (name,), ProductWeight(module, BIAS, constant))


class _WithWeight:
    """A module with a given weight, which is not computed for its shape alone."""

    def __init__(self, module: nn.Module, name: str, weight: Tensor) -> None:
        self._module = module
        setattr(self, name, weight)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def _layout(
    module: nn.Module, rule: LayerRule, names: Mapping[Tensor, str], computed: NamedWeight | None
) -> Layout:
    """Return the layout of a module's trained parameters, by their names in the model."""
    own = dict(module.named_parameters(recurse=False))
    if computed is None:
        weight = own[rule.weight]
        name, (split, order) = names[weight], rule.split(module)
    else:  # to compute it could change buffers
        weight = next(iter(computed.tensors().values()))
        name, own_module = computed.name, _WithWeight(module, rule.weight, weight)
        split, order = rule.split(own_module)
    bias = own.get(rule.bias)
    if bias is None or not bias.requires_grad:
        return Layout(name, None, tuple(weight.shape), split, order)
    return Layout(name, names[bias], tuple(weight.shape), split, order, tuple(bias.shape))

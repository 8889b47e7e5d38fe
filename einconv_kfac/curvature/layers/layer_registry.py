"""The rule for each type of layer: those in ``layers/rules/`` and those of users."""

from __future__ import annotations

from torch import nn

from einconv_kfac.curvature.arguments import described
from einconv_kfac.curvature.layers import rules
from einconv_kfac.curvature.layers.layer_rule import LayerRule
from einconv_kfac.curvature.type_registry import Kind, TypeRegistry, defined_classes


def built_in_rules() -> dict[Kind, LayerRule]:
    """Return the rules that the files of ``layers/rules/`` define, by type of layer."""
    found: list[type[LayerRule]] = defined_classes(rules, LayerRule)
    return {kind: rule() for rule in found for kind in rule.kinds}


_REGISTRY: TypeRegistry[LayerRule] = TypeRegistry(built_in_rules())


def register_layer(kind: type[nn.Module], rule: LayerRule) -> None:
    """Use a rule for a type of layer and its subclasses.

    The layer must have a parameter ``weight`` and may have a parameter ``bias``. It then takes
    part in `kronecker_factors`, and in the optimizer if its rule is ``preconditioned``.

    Args:
        kind: The type of layer.
        rule: Its rule. Of several that fit a layer, the one registered last applies.

    Raises:
        TypeError: If ``kind`` is no type of module, or ``rule`` no instance of `LayerRule`.

    >>> from einconv_kfac.curvature import LinearRule
    >>> class Patches(nn.Linear):  # a linear layer of 2x2 patches
    ...     def forward(self, x):
    ...         return super().forward(nn.functional.unfold(x, 2, stride=2).mT)
    >>> class PatchesRule(LinearRule):
    ...     def inputs(self, module, x, y_shape):
    ...         return nn.functional.unfold(x, 2, stride=2).unsqueeze(1)
    ...     input_factor = LayerRule.input_factor
    >>> register_layer(Patches, PatchesRule())
    """
    if not isinstance(rule, LayerRule):
        raise TypeError(f"`rule` must be an instance of LayerRule, got {described(rule)}.")
    _REGISTRY.register(kind, rule)


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` if no rule covers its type."""
    return _REGISTRY.rule(module)


def overrides_forward(module: nn.Module) -> bool:
    """Return whether a layer's forward pass may differ from the one that its rule describes.

    It may if a subclass of the rule's type overrides it, outside of torch and this package, or if
    it was replaced in the layer itself.
    """
    if "forward" in vars(module):
        return True
    kinds = [kind for kind, _ in _REGISTRY.fitting(module)]
    author = next(base for base in type(module).__mro__ if "forward" in vars(base))
    trusted = author.__module__.startswith(("torch.nn.", "einconv_kfac."))
    return bool(kinds) and not trusted and not issubclass(kinds[0], author)


def is_hidden(module: nn.Module) -> bool:
    """Return whether a layer's calls bypass its hooks unless its parent's rule reveals them."""
    return any(isinstance(module, rule.revealed) for _, rule in _REGISTRY)

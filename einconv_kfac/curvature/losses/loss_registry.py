"""The rule for each type of loss: those in ``losses/rules/`` and those of users."""

from __future__ import annotations

from torch import nn

from einconv_kfac.curvature.losses import rules
from einconv_kfac.curvature.losses.loss_call import check_reduction
from einconv_kfac.curvature.losses.loss_rule import LossRule, TorchLossRule
from einconv_kfac.curvature.type_registry import TypeRegistry, defined_classes


def built_in_rules() -> dict[type[nn.Module], TorchLossRule]:
    """Return the rules that the files of ``losses/rules/`` define, by type of loss."""
    found: list[type[TorchLossRule]] = defined_classes(rules, TorchLossRule)
    return {kind: rule() for rule in found for kind in rule.kinds}


_REGISTRY: TypeRegistry[LossRule] = TypeRegistry({**built_in_rules()})


def register_loss(kind: type[nn.Module], rule: LossRule) -> None:
    """Use a rule for a type of loss and its subclasses.

    Args:
        kind: The type. Its instances may have a ``reduction``, ``"mean"`` or ``"sum"``;
            without one they must be means over examples.
        rule: Its rule; `EntrywiseRule` serves every loss that is a sum over output entries.

    >>> from einconv_kfac.curvature import EntrywiseRule
    >>> class LogCosh(nn.Module):
    ...     def forward(self, output, target):
    ...         return (output - target).cosh().log().mean()
    >>> register_loss(LogCosh, EntrywiseRule())
    """
    _REGISTRY.register(kind, rule)


def loss_rule(loss: nn.Module) -> LossRule:
    """Return the rule for a loss; of several, the one registered last.

    Raises:
        ValueError: If no rule covers its type, or its reduction is ``"none"``.
    """
    rule = _REGISTRY.rule(loss)
    if rule is None:
        known = ", ".join(kind.__name__ for kind, _ in _REGISTRY)
        raise ValueError(
            f"`loss_fn` must be one of {known}, got {type(loss).__name__}. fisher='empirical' "
            "takes any loss; `register_loss` adds a rule."
        )
    check_reduction(loss)
    return rule


def has_rule(loss: nn.Module) -> bool:
    """Return whether a rule covers the type of a loss."""
    return _REGISTRY.rule(loss) is not None

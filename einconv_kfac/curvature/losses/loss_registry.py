"""The rule for each type of loss: those in ``losses/rules/`` and those of users."""

from __future__ import annotations

from inspect import signature
from typing import Any, cast

from torch import Tensor, nn

from einconv_kfac.curvature.arguments import described
from einconv_kfac.curvature.losses import rules
from einconv_kfac.curvature.losses.loss_call import check_reduction
from einconv_kfac.curvature.losses.loss_rule import (
    Link,
    LossRule,
    TorchLossRule,
    WeightedLossRule,
)
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

    Raises:
        TypeError: If ``kind`` is no type of module, or ``rule`` is no rule.

    >>> from einconv_kfac.curvature import EntrywiseRule
    >>> class LogCosh(nn.Module):
    ...     def forward(self, output, target):
    ...         return (output - target).cosh().log().mean()
    >>> register_loss(LogCosh, EntrywiseRule())
    """
    methods = [getattr(rule, name, None) for name in ("roots", "sample")]
    if isinstance(rule, type) or not all(map(callable, methods)):
        raise TypeError(
            f"`rule` must be an instance with methods `roots` and `sample`, got {described(rule)}."
        )
    _REGISTRY.register(kind, rule)


def loss_rule(loss: nn.Module) -> LossRule:
    """Return the rule for a loss; of several, the one registered last.

    Raises:
        ValueError: If no rule covers its type, its reduction is ``"none"``, or its options
            leave it without curvature.
    """
    rule = _rule(loss)
    check_reduction(loss)
    return rule


def weighted_loss_rule(loss: nn.Module) -> WeightedLossRule:
    """Return the rule for a loss whose entries have weights in place of its reduction.

    Raises:
        ValueError: If no rule covers its type, or the rule takes no weights.
    """
    rule = _rule(loss)
    if any("weights" not in signature(each).parameters for each in (rule.roots, rule.sample)):
        raise ValueError(
            f"The rule for {type(loss).__name__} must take `weights` if the entries of the loss "
            f"are weighted outside of it, got {type(rule).__name__}, which does not. Add the "
            "argument to `roots` and `sample`, or reduce the loss inside its module."
        )
    return cast(WeightedLossRule, rule)


def has_targets(loss: object, output: Any, target: Any) -> bool:
    """Return whether a batch has a target that counts in the mean of a loss.

    It has none if all labels are ignored, if the class weight of each is zero, or if the output
    is empty. Such a mean is ``0 / 0``.
    """
    if not isinstance(output, Tensor) or output.numel() == 0:
        return not isinstance(output, Tensor)
    if not isinstance(loss, nn.Module):
        return True
    rule = found_rule(loss)
    if not isinstance(rule, TorchLossRule) or not rule.is_own(loss):
        return True
    return bool(rule.divisor(loss, output, target) != 0)


def canonical_scores(loss: nn.Module, output: Tensor, target: Any) -> tuple[Tensor, Link]:
    """Return scores and the link to the output for which the curvature is the loss' Hessian."""
    rule = _rule(loss)
    if isinstance(rule, TorchLossRule):
        return rule.canonical(loss, output, target)
    return output, lambda scores: scores


def found_rule(loss: nn.Module) -> LossRule | None:
    """Return the rule for the type of a loss, or ``None``."""
    return _REGISTRY.rule(loss)


def _rule(loss: nn.Module) -> LossRule:
    """Return the rule for a loss, whatever its reduction."""
    rule = found_rule(loss)
    if rule is None:
        known = ", ".join(getattr(kind, "__name__", str(kind)) for kind, _ in _REGISTRY)
        raise ValueError(
            f"`loss_fn` must be one of {known}, got {type(loss).__name__}. fisher='empirical' "
            "takes any loss; `register_loss` adds a rule."
        )
    fault = rule.fault(loss) if isinstance(rule, TorchLossRule) else None
    if fault is not None:
        raise ValueError(f"{fault}; fisher='empirical' takes any loss.")
    return rule


def is_overridden(loss: nn.Module) -> bool:
    """Return whether a loss is a subclass of one of torch's that computes something else."""
    rule = found_rule(loss)
    return isinstance(rule, TorchLossRule) and not (rule.is_own(loss) or is_registered(loss))


def is_built_in(loss: nn.Module) -> bool:
    """Return whether a loss is torch's own, with a rule of this package."""
    rule = found_rule(loss)
    return isinstance(rule, TorchLossRule) and rule.is_own(loss) and not is_registered(loss)


def is_registered(loss: nn.Module) -> bool:
    """Return whether a user registered a rule for a loss."""
    return _REGISTRY.is_registered(loss)


def has_rule(loss: nn.Module) -> bool:
    """Return whether a rule covers a loss, with its options and its reduction."""
    try:
        loss_rule(loss)
    except ValueError:
        return False
    return True

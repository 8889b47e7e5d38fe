"""The search for weights that layers compute from parameters."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from einconv_kfac.curvature.layers.computed.product import Constant, ProductWeight
from einconv_kfac.curvature.layers.computed.standardization import KINDS, StandardizedWeight
from einconv_kfac.curvature.layers.computed.weight_norm import NormalizedWeight
from einconv_kfac.curvature.layers.computed_weight import ComputedWeight


def computed_weight(module: nn.Module, name: str) -> ComputedWeight | None:
    """Return how a module computes a weight, or ``None`` if it does not, or in no known way.

    Args:
        module: The module.
        name: Name of the weight in it.
    """
    found = _by_parametrization(module, name) or _by_hook(module, name)
    if found is None and is_standardized(module):
        found = StandardizedWeight(module)
    is_whole = found is not None and len(found.parameters()) == len(found.attributes)
    return found if is_whole else None


def is_standardized(module: nn.Module) -> bool:
    """Return whether a module standardizes its weight in the forward pass."""
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__}
    return not names.isdisjoint(KINDS)


def _by_parametrization(module: nn.Module, name: str) -> ComputedWeight | None:
    """Return a weight that ``torch.nn.utils.parametrize`` computes."""
    if not is_parametrized(module, name):
        return None
    entries: Any = module.parametrizations
    owner, path = entries[name], f"parametrizations.{name}."
    if len(entries) > 1 or len(owner) > 1:
        return None
    if type(owner[0]) is not parametrizations._WeightNorm:
        return None
    return NormalizedWeight(owner, ("original1", "original0"), path)


def _by_hook(module: nn.Module, name: str) -> ComputedWeight | None:
    """Return a weight that a hook computes before each call."""
    hooks = list(module._forward_pre_hooks.values())
    own = [hook for hook in hooks if name in (getattr(hook, "name", None), _pruned(hook))]
    if len(own) != 1 or name in module._parameters:
        return None
    if type(own[0]) is WeightNorm:
        return NormalizedWeight(module, (f"{name}_v", f"{name}_g"))
    if _pruned(own[0]) is not None:
        return ProductWeight(module, f"{name}_orig", Constant(f"{name}_mask"))
    return None


def _pruned(hook: Any) -> str | None:
    """Return the name of the tensor that a hook multiplies by its mask, if it prunes one.

    Scripts that prune have imported the module of these hooks.
    """
    prune = sys.modules.get("torch.nn.utils.prune")
    if prune is None or not isinstance(hook, prune.BasePruningMethod):
        return None
    name: str = hook._tensor_name
    return name if type(hook).apply_mask is prune.BasePruningMethod.apply_mask else None

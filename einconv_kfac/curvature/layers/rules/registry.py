"""Which rule belongs to which type of layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm

from einconv_kfac.curvature.layers.rules.attention import AttentionRule
from einconv_kfac.curvature.layers.rules.convolution import ConvRule, TransposedConvRule
from einconv_kfac.curvature.layers.rules.embedding import EmbeddingRule
from einconv_kfac.curvature.layers.rules.linear import LinearRule
from einconv_kfac.curvature.layers.rules.normalization import ChannelNormRule, TrailingNormRule
from einconv_kfac.curvature.layers.rules.rule import LayerRule

_RULES: list[tuple[type[nn.Module], LayerRule]] = [
    (nn.Linear, LinearRule()),
    (_ConvNd, ConvRule()),
    (_ConvTransposeNd, TransposedConvRule()),
    (nn.Embedding, EmbeddingRule()),
    (_BatchNorm, ChannelNormRule()),
    (_InstanceNorm, ChannelNormRule()),
    (nn.GroupNorm, ChannelNormRule()),
    (nn.LayerNorm, TrailingNormRule()),
    (nn.RMSNorm, TrailingNormRule()),
    (nn.MultiheadAttention, AttentionRule()),
]


def register_layer(kind: type[nn.Module], rule: LayerRule) -> None:
    """Use a rule for a type of layer and its subclasses.

    The layer must have a parameter ``weight`` and may have a parameter ``bias``. It then takes
    part in `kronecker_factors`, and in the optimizer if its rule is ``preconditioned``.

    Args:
        kind: The type of layer.
        rule: Its rule. Of several that fit a layer, the one registered last counts.

    >>> class Patches(nn.Linear):  # a linear layer of 2x2 patches
    ...     def forward(self, x):
    ...         return super().forward(nn.functional.unfold(x, 2, stride=2).mT)
    >>> class PatchesRule(LinearRule):
    ...     def inputs(self, module, x, y_shape):
    ...         return nn.functional.unfold(x, 2, stride=2).unsqueeze(1)
    ...     input_factor = LayerRule.input_factor
    >>> register_layer(Patches, PatchesRule())
    """
    _RULES.append((kind, rule))


def layer_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` if no rule covers its type."""
    return next((rule for _, rule in _fitting(module)), None)


def overrides_forward(module: nn.Module) -> bool:
    """Tell whether a layer's type computes something its rule may not know.

    That is a subclass with a forward pass of its own, unless torch or this package wrote it.
    """
    kinds = [kind for kind, _ in _fitting(module)]
    author = next(base for base in type(module).__mro__ if "forward" in vars(base))
    known = author.__module__.startswith(("torch.nn.", "einconv_kfac."))
    return bool(kinds) and not known and not issubclass(kinds[0], author)


def _fitting(module: nn.Module) -> Iterator[tuple[type[nn.Module], LayerRule]]:
    """Yield the types and rules that fit a module, the one registered last first."""
    return ((kind, rule) for kind, rule in reversed(_RULES) if isinstance(module, kind))

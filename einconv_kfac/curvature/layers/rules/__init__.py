"""What K-FAC needs to know about each type of layer, and a registry of it."""

from einconv_kfac.curvature.layers.rules.attention import AttentionRule
from einconv_kfac.curvature.layers.rules.convolution import ConvRule, TransposedConvRule
from einconv_kfac.curvature.layers.rules.embedding import EmbeddingRule
from einconv_kfac.curvature.layers.rules.linear import LinearRule
from einconv_kfac.curvature.layers.rules.normalization import ChannelNormRule, TrailingNormRule
from einconv_kfac.curvature.layers.rules.registry import (
    layer_rule,
    overrides_forward,
    register_layer,
)
from einconv_kfac.curvature.layers.rules.rule import Approximation, LayerRule

__all__ = [
    "Approximation",
    "AttentionRule",
    "ChannelNormRule",
    "ConvRule",
    "EmbeddingRule",
    "LayerRule",
    "LinearRule",
    "TrailingNormRule",
    "TransposedConvRule",
    "layer_rule",
    "overrides_forward",
    "register_layer",
]

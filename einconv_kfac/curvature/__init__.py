"""Curvature as Kronecker factors."""

from einconv_kfac.curvature.blocks.block_diagonal import KroneckerFactors, pooled
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.blocks.kronecker import KroneckerBlock
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.curvature.blocks.sums import SumBlock
from einconv_kfac.curvature.estimation.estimate import kronecker_factors
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.estimation.verification import Verification, verify
from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.curvature.layers.coverage import Coverage, coverage
from einconv_kfac.curvature.layers.discovery import find_layers
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_registry import register_layer
from einconv_kfac.curvature.layers.layer_rule import LayerRule
from einconv_kfac.curvature.layers.rules.linear import LinearRule
from einconv_kfac.curvature.losses import EntrywiseRule, LossRule, register_loss

__all__ = [
    "Coverage",
    "EigenBlock",
    "EntrywiseRule",
    "FisherEstimator",
    "KroneckerBlock",
    "KroneckerFactors",
    "Layer",
    "LayerRule",
    "Layout",
    "LinearRule",
    "LossRule",
    "SumBlock",
    "Verification",
    "conv_input_factor",
    "conv_output_factor",
    "conv_transpose_input_factor",
    "coverage",
    "find_layers",
    "kronecker_factors",
    "linear_input_factor",
    "output_factor",
    "pooled",
    "register_layer",
    "register_loss",
    "verify",
]

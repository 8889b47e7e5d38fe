"""Curvature as Kronecker factors."""

from einconv_kfac.curvature.collection import KroneckerFactors
from einconv_kfac.curvature.eigen import EigenBlock
from einconv_kfac.curvature.estimate import kronecker_factors
from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.curvature.fisher import FisherEstimator
from einconv_kfac.curvature.kronecker import KroneckerBlock
from einconv_kfac.curvature.layers import Layer, find_layers
from einconv_kfac.curvature.layout import Layout
from einconv_kfac.curvature.losses import EntrywiseRule, LossRule, register_loss
from einconv_kfac.curvature.rules import LayerRule, LinearRule, register_layer

__all__ = [
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
    "conv_input_factor",
    "conv_output_factor",
    "conv_transpose_input_factor",
    "find_layers",
    "kronecker_factors",
    "linear_input_factor",
    "output_factor",
    "register_layer",
    "register_loss",
]

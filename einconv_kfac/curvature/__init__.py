"""Curvature as Kronecker factors."""

from einconv_kfac.curvature.collection import KroneckerFactors, pooled
from einconv_kfac.curvature.coverage import Coverage, coverage
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
from einconv_kfac.curvature.sums import SumBlock
from einconv_kfac.curvature.verification import Verification, verify

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

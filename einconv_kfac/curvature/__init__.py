"""Curvature as Kronecker factors."""

from einconv_kfac.curvature.factors import (
    conv_input_factor,
    conv_output_factor,
    conv_transpose_input_factor,
    linear_input_factor,
    output_factor,
)
from einconv_kfac.curvature.fisher import FisherEstimator, kronecker_factors
from einconv_kfac.curvature.kronecker import KroneckerBlock, KroneckerFactors

__all__ = [
    "FisherEstimator",
    "KroneckerBlock",
    "KroneckerFactors",
    "conv_input_factor",
    "conv_output_factor",
    "conv_transpose_input_factor",
    "kronecker_factors",
    "linear_input_factor",
    "output_factor",
]

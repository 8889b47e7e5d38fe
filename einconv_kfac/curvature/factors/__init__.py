"""Kronecker factors of linear layers and convolutions, from inputs and output gradients.

Each is a plain function of tensors, independent of modules and losses.
"""

from einconv_kfac.curvature.factors.choice import explain
from einconv_kfac.curvature.factors.input_factor import (
    conv_input_factor,
    conv_transpose_input_factor,
    linear_input_factor,
)
from einconv_kfac.curvature.factors.output_factor import conv_output_factor, output_factor

__all__ = [
    "conv_input_factor",
    "conv_output_factor",
    "conv_transpose_input_factor",
    "explain",
    "linear_input_factor",
    "output_factor",
]

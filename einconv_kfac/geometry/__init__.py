"""The hyper-parameters and sizes of a convolution, as one immutable value without tensors.

A convolution is a set of independent *axes* (its spatial dimensions) and a number of channel
groups. Along one axis, input ``i`` meets kernel entry ``k`` for output ``o`` iff
``i = o * stride + k * dilation - left`` and ``0 <= i < input_size``. Everything else in this
package follows from that line.
"""

from einconv_kfac.geometry.axis import Axis
from einconv_kfac.geometry.geometry import Geometry
from einconv_kfac.geometry.parsing import conv_geometry, parse_geometry
from einconv_kfac.geometry.spellings import (
    Padding,
    Sizes,
    hashable,
    parse_padding,
    per_dimension,
    same_padding,
)
from einconv_kfac.geometry.transposed import (
    conv_transpose_geometry,
    output_padding_of,
)

__all__ = [
    "Axis",
    "Geometry",
    "Padding",
    "Sizes",
    "conv_geometry",
    "conv_transpose_geometry",
    "hashable",
    "output_padding_of",
    "parse_geometry",
    "parse_padding",
    "per_dimension",
    "same_padding",
]

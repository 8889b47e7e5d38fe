"""Argument lists of the operations, in einconv's order, one per kind of call.

A signature returns its arguments sorted into tensors and hyper-parameters; `bound` makes an
operation of it. Signatures are plain functions, so that type checkers and ``inspect`` see the
names and defaults and a call costs no more than Python's own binding.
"""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.expressions.call import Call, Options
from einconv_kfac.geometry import Padding, Sizes

# fmt: off
# One parameter per line would make this table three times as long.


def input_weight(
    x: Tensor, weight: Tensor,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input and kernel."""
    return Call((x, weight), Options(stride, padding, dilation, groups), simplify)


def input_tangent(
    x: Tensor, v: Tensor,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input, and a tangent of the kernel."""
    return Call((x, v), Options(stride, padding, dilation, groups), simplify)


def weight_vector(
    weight: Tensor, v: Tensor,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Kernel, and a vector to which the convolution is applied."""
    return Call((weight, v), Options(stride, padding, dilation, groups), simplify)


def weight_vector_size(
    weight: Tensor, v: Tensor, input_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Kernel, a vector like the output, and the size of the input."""
    options = Options(stride, padding, dilation, groups, input_size=input_size)
    return Call((weight, v), options, simplify)


def weight_size(
    weight: Tensor, input_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Kernel, and the size of the input."""
    options = Options(stride, padding, dilation, groups, input_size=input_size)
    return Call((weight,), options, simplify)


def input_vector(
    x: Tensor, v: Tensor, kernel_size: Sizes,
    dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input, a vector like the output, and the size of the kernel."""
    return Call((x, v), Options(stride, padding, dilation, groups, kernel_size), simplify)


def input_vectors(
    x: Tensor, s: Tensor, kernel_size: Sizes,
    dilation: Sizes = 1, padding: Padding = 0, stride: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input, several vectors like the output, and the size of the kernel."""
    return Call((x, s), Options(stride, padding, dilation, groups, kernel_size), simplify)


def input_kernel(
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input, and the size of the kernel."""
    return Call((x,), Options(stride, padding, dilation, groups, kernel_size), simplify)


def ungrouped_input_kernel(
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1,
    simplify: bool = True,
) -> Call:
    """Input without groups, and the size of the kernel."""
    return Call((x,), Options(stride, padding, dilation, 1, kernel_size), simplify)


def columns(
    z: Tensor, input_size: Sizes, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, dilation: Sizes = 1,
    simplify: bool = True,
) -> Call:
    """Columns, and the sizes of image and kernel."""
    options = Options(stride, padding, dilation, input_size=input_size, kernel_size=kernel_size)
    return Call((z,), options, simplify)


def transposed_input_weight(
    x: Tensor, weight: Tensor,
    stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0,
    dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input and kernel of a transposed convolution."""
    options = Options(stride, padding, dilation, groups, output_padding=output_padding)
    return Call((x, weight), options, simplify)


def transposed_ungrouped_input_kernel(
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0, dilation: Sizes = 1,
    simplify: bool = True,
) -> Call:
    """Input of a transposed convolution without groups, and the size of the kernel."""
    return Call((x,), Options(stride, padding, dilation, 1, kernel_size, output_padding), simplify)


def transposed_input_kernel(
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0,
    dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input of a transposed convolution, and the size of the kernel."""
    options = Options(stride, padding, dilation, groups, kernel_size, output_padding)
    return Call((x,), options, simplify)


def transposed_input_kernel_size(
    x: Tensor, kernel_size: Sizes,
    stride: Sizes = 1, padding: Padding = 0, output_padding: Sizes = 0,
    output_size: Sizes | None = None, dilation: Sizes = 1, groups: int = 1,
    simplify: bool = True,
) -> Call:
    """Input of a transposed convolution, and the sizes of kernel and result."""
    sizes = (kernel_size, output_padding, output_size)
    return Call((x,), Options(stride, padding, dilation, groups, *sizes), simplify)

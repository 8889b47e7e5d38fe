"""A call of ``einsum_expression``: from arguments to a cached expression with its tensors."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import NamedTuple, ParamSpec

from torch import Tensor

from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    conv_geometry,
    conv_transpose_geometry,
    hashable,
    output_padding_of,
)
from einconv_kfac.network import Network, Shape, cached, simplified

Parameters = ParamSpec("Parameters")

MEANING = {
    "kernel_size": "Kernel entries, one number or one per dimension.",
    "input_size": "Input positions, one number or one per dimension.",
    "stride": "Step between windows, one number or one per dimension; so are the others.",
    "padding": "Zeros around the input; if transposed, positions removed around the result.",
    "output_padding": "Positions that the result of a transposed convolution gains on the right.",
    "output_size": "Positions of the result, instead of ``output_padding``.",
    "dilation": "Step between kernel entries.",
    "groups": "Number of channel groups.",
    "simplify": "Whether to simplify the expression.",
}
"""What the hyper-parameters of every operation mean."""


RAISES = """Raises:
        ValueError: If shapes and groups do not match, or the numbers describe no convolution."""
"""What every operation does with arguments that it cannot use."""


class Options(NamedTuple):
    """Hyper-parameters as the caller spells them."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int = 1
    kernel_size: Sizes = ()
    output_padding: Sizes = 0
    output_size: Sizes | None = None
    input_size: Sizes = ()

    def geometry(self, input_size: Shape, kernel_size: Shape | None = None) -> Geometry:
        """Return the convolution of an input, whose kernel may be known by its shape."""
        kernel = self.kernel_size if kernel_size is None else kernel_size
        return conv_geometry(input_size, kernel, *self[:4])

    def transposed(self, input_size: Shape, kernel_size: Shape | None = None) -> Geometry:
        """Return the convolution whose adjoint takes the input of a transposed convolution."""
        kernel = self.kernel_size if kernel_size is None else kernel_size
        stride, padding, dilation, groups = self[:4]
        more = self.output_padding
        if self.output_size is not None:
            sizes = self.output_size, input_size, kernel
            more = output_padding_of(*sizes, stride, padding, dilation)
        return conv_transpose_geometry(input_size, kernel, stride, padding, more, dilation, groups)


class Call(NamedTuple):
    """The arguments of a call, told apart."""

    tensors: tuple[Tensor, ...]
    options: Options
    simplify: bool


def bound(
    signature: Callable[Parameters, Call], slots: tuple[int, ...] | None = None
) -> Callable[[Callable[..., Network]], Callable[Parameters, Bound]]:
    """Turn the network of an operation into an einsum expression with the caller's tensors.

    Args:
        signature: One of `signatures`; it sorts the arguments of a call.
        slots: Which of the signature's tensors are the network's, in the order of its slots;
            all, in their order, if not given.

    Returns:
        A decorator for a function from the tensors' shapes, in that order, and the `Options` to
        the network. The expression is cached on these.
    """

    def decorate(network: Callable[..., Network]) -> Callable[Parameters, Bound]:
        @cached(maxsize=1024)
        @wraps(network)
        def expression(shapes: tuple[Shape, ...], options: Options, simplify: bool) -> Expression:
            found = network(*map(tuple, shapes), Options(*options))
            found = replace(found, reshape_only=True)
            return Expression(simplified(found) if simplify else found)

        @wraps(network)
        def einsum_expression(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Bound:
            tensors, options, simplify = signature(*args, **kwargs)
            if slots is not None:
                tensors = tuple(tensors[slot] for slot in slots)
            shapes = tuple(tensor.shape for tensor in tensors)
            return expression(shapes, hashable(options), simplify).bind(*tensors)

        parameters = inspect.signature(signature)
        described: object = parameters.replace(return_annotation="Bound")
        vars(einsum_expression)["__signature__"] = described
        einsum_expression.__doc__ = _documented(network.__doc__ or "", list(parameters.parameters))
        return einsum_expression

    return decorate


def _documented(text: str, parameters: list[str]) -> str:
    """Spell out what a docstring has as ``options: OPTIONS``, and what is raised."""
    lines = (f"{name}: {MEANING[name]}" for name in parameters if name in MEANING)
    text = text.replace("options: OPTIONS", "\n        ".join(lines))
    return text.replace("\n    >>>", f"\n    {RAISES}\n\n    >>>", 1)

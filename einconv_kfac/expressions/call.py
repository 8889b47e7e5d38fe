"""Calls of ``einsum_expression``: arguments, cached expressions, documentation."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from typing import NamedTuple, ParamSpec

import torch
from torch import Tensor

from einconv_kfac.expressions.conjugation import Copy, with_conjugates
from einconv_kfac.expressions.expression import Bound, Expression
from einconv_kfac.expressions.shapes import check_tensor
from einconv_kfac.geometry import (
    Geometry,
    Padding,
    Sizes,
    conv_geometry,
    conv_transpose_geometry,
    hashable,
    output_padding_of,
)
from einconv_kfac.geometry.spellings import as_flag
from einconv_kfac.network import Network, Shape, cached, simplified

Parameters = ParamSpec("Parameters")

MEANING = {
    "kernel_size": "Kernel entries, one number or one per dimension.",
    "input_size": "Input positions, one number or one per dimension.",
    "stride": "Positions between windows, one number or one per dimension.",
    "padding": "Zeros around the input; if transposed, positions removed from the result.",
    "output_padding": "Further positions on the right of a transposed convolution's result.",
    "output_size": "Positions of the result, instead of ``output_padding``.",
    "dilation": "Positions between kernel entries, one number or one per dimension.",
    "groups": "Number of channel groups.",
    "simplify": "Whether to simplify the expression.",
}
"""Descriptions of the hyper-parameters, shared by the docstrings of all operations."""


ERRORS = """Raises:
        ValueError: If shapes and groups do not match, or the numbers describe no convolution.
        TypeError: If an argument is of another type."""
"""The errors of all operations, shared by their docstrings."""


class Options(NamedTuple):
    """Hyper-parameters in the caller's spelling."""

    stride: Sizes
    padding: Padding
    dilation: Sizes
    groups: int = 1
    kernel_size: Sizes = ()
    output_padding: Sizes = 0
    output_size: Sizes | None = None
    input_size: Sizes = ()

    def geometry(self, input_size: Shape, kernel_size: Shape | None = None) -> Geometry:
        """Return the convolution of an input, or of an input and a kernel of these sizes."""
        kernel = self.kernel_size if kernel_size is None else kernel_size
        return conv_geometry(input_size, kernel, *self[:4])

    def transposed(self, input_size: Shape, kernel_size: Shape | None = None) -> Geometry:
        """Return the convolution whose adjoint is the transposed convolution of an input."""
        kernel = self.kernel_size if kernel_size is None else kernel_size
        stride, padding, dilation, groups = self[:4]
        more = self.output_padding
        if self.output_size is not None:
            sizes = self.output_size, input_size, kernel
            more = output_padding_of(*sizes, stride, padding, dilation)
        return conv_transpose_geometry(input_size, kernel, stride, padding, more, dilation, groups)


class Call(NamedTuple):
    """The arguments of a call, sorted into tensors and hyper-parameters."""

    tensors: tuple[Tensor, ...]
    options: Options
    simplify: bool


def bound(
    signature: Callable[Parameters, Call],
    slots: tuple[int, ...] | None = None,
    conjugated: tuple[Copy, ...] = (),
) -> Callable[[Callable[..., Network]], Callable[Parameters, Bound]]:
    """Return a decorator that makes ``einsum_expression`` of an operation's network.

    Args:
        signature: One of `signatures`; it sorts the arguments of a call.
        slots: Position among the signature's tensors of the tensor for each of the network's
            slots; all tensors in order if not given.
        conjugated: The copies of tensors in the network that are conjugated if they are complex.

    Returns:
        A decorator for a function from the shapes of the slots' tensors and the `Options` to
        the network. Expressions are cached by shapes, options and ``simplify``.
    """

    def decorate(network: Callable[..., Network]) -> Callable[Parameters, Bound]:
        @cached(maxsize=1024)
        @wraps(network)
        def expression(
            shapes: tuple[Shape, ...], options: Options, simplify: bool, copies: tuple[Copy, ...]
        ) -> Expression:
            found = network(*map(tuple, shapes), Options(*options))
            found = replace(with_conjugates(found, copies), reshape_only=True)
            return Expression(simplified(found) if simplify else found)

        parameters = inspect.signature(signature)
        names = list(parameters.parameters)

        @wraps(network)
        def einsum_expression(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Bound:
            tensors, options, simplify = signature(*args, **kwargs)
            check_alike(tensors, names)
            if slots is not None:
                tensors = tuple(tensors[slot] for slot in slots)
            shapes = tuple(tensor.shape for tensor in tensors)
            copies = conjugated if tensors[0].is_complex() else ()
            found = expression(shapes, hashable(options), as_flag(simplify, "simplify"), copies)
            return found.bind(*tensors, *(tensor.conj() for tensor in tensors if copies))

        described: object = parameters.replace(return_annotation="Bound")
        vars(einsum_expression)["__signature__"] = described
        einsum_expression.__doc__ = _documented(network.__doc__ or "", names)
        return einsum_expression

    return decorate


def check_alike(tensors: Sequence[Tensor], names: Sequence[str]) -> None:
    """Raise an error if an argument is no tensor, or not of the first's type and device."""
    like = tensors[0]
    check_tensor(like, names[0])
    for name, tensor in zip(names, tensors):
        check_tensor(tensor, name)
        if tensor.device != like.device:
            raise ValueError(
                f"`{name}` must be on {like.device}, as `{names[0]}`, got {tensor.device}."
            )
        if tensor.dtype != like.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(f"`{name}` must be {like.dtype}, as `{names[0]}`, got {tensor.dtype}.")


def _documented(text: str, parameters: list[str]) -> str:
    """Replace ``options: OPTIONS`` in a docstring by all parameters, and add the errors."""
    lines = (f"{name}: {MEANING[name]}" for name in parameters if name in MEANING)
    text = text.replace("options: OPTIONS", "\n        ".join(lines))
    return text.replace("\n    >>>", f"\n    {ERRORS}\n\n    >>>", 1)

"""Calls of functions of torch inside of modules, whose weight is a parameter times a constant.

A layer that masks its weight, or scales it, has a forward pass of its own, which calls
``functional.linear`` or ``functional.conv2d``. The inputs and outputs of these are the layer's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.computed.constant_factor import ConstantFactor, constant_factor
from einconv_kfac.curvature.layers.computed.product import Constant
from einconv_kfac.curvature.layers.interception import Records

Options = tuple[Any, ...]
"""Stride, padding, dilation and number of groups of a convolution; of a linear layer none."""
WEIGHT, BIAS = "weight", "bias"
_LINEAR = {"input": None, WEIGHT: None, BIAS: None}
_CONVOLUTION = {**_LINEAR, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
FUNCTIONS: Mapping[str, Mapping[str, Any]] = {
    "linear": _LINEAR,
    **{f"conv{dims}d": _CONVOLUTION for dims in (1, 2, 3)},
}
"""The arguments of functions in their order, with defaults, by the names of these."""


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call.

    Args:
        x: The input.
        weight: The weight.
        bias: The bias, if there is one.
        options: See `Options`.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    options: Options


def arguments_of(function: Any, *args: Any, **kwargs: Any) -> Arguments:
    """Return the arguments of a call of one of `FUNCTIONS`."""
    names = FUNCTIONS[function.__name__]
    own = {**names, **dict(zip(names, args)), **kwargs}
    x, weight, bias = (own.pop(name) for name in ("input", WEIGHT, BIAS))
    dims, groups = weight.ndim - 2, own.pop("groups", None)
    options = tuple(_each(value, dims) for value in own.values())
    return Arguments(x, weight, bias, options if groups is None else (*options, groups))


def _each(value: Any, dims: int) -> Any:
    """Return an option with an entry for each dimension; paddings may be words."""
    if isinstance(value, str):
        return value
    entries = (value,) if isinstance(value, int) else tuple(value)
    return entries * dims if len(entries) == 1 else entries


@dataclass(frozen=True)
class InnerCall:
    """The call of a module's forward pass.

    Args:
        options: Its options.
        weight: What its weight is multiplied by.
        bias: What its bias is multiplied by, if it has one that is a parameter times a constant.
    """

    options: Options
    weight: Constant
    bias: Constant | None


KNOWN: WeakKeyDictionary[nn.Module, InnerCall] = WeakKeyDictionary()
"""The calls of modules that were found to have one."""


def has_weight(module: nn.Module, _: Sequence[Any]) -> bool:
    """Return whether a module has its weight; `run` tells which calls are made with it."""
    return module._parameters.get(WEIGHT) is not None


def run(module: Any, records: Records, function: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what a function of torch returns, and record its call if its weight is the module's.

    Args:
        module: The module.
        records: Takes the calls of its weight.
        function: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    y = function(*args, **kwargs)
    call, known = arguments_of(function, *args, **kwargs), KNOWN.get(module)
    factor = constant_factor(call.weight, module._parameters[WEIGHT])
    if known is None or factor is None or call.options != known.options:
        return y
    others = bias_factor(module, call)
    if known.bias is not None and others is None:
        return y
    if factor.is_known and isinstance(module._parameters[WEIGHT], nn.Parameter):
        known.weight.see_(module, factor.value())
        if known.bias is not None and others is not None:
            known.bias.see_(module, others.value())
    records[WEIGHT](call.x, y)
    return y


def bias_factor(module: nn.Module, call: Arguments) -> ConstantFactor | None:
    """Return what the bias of a module is multiplied by in a call, or ``None`` if it is not used.

    Tensors are compared with the parameter as it is at present.
    """
    own = module._parameters.get(BIAS)
    return None if own is None or call.bias is None else constant_factor(call.bias, own)


REPLACEMENTS = dict.fromkeys(FUNCTIONS, run)


class _Always:
    """Takes the calls of every pass with gradients, so that the latest constant is known."""

    @property
    def is_active(self) -> bool:
        """Whether gradients are enabled."""
        return torch.is_grad_enabled()

    def __call__(self, *_: object) -> None:
        """Ignore a call."""


ALWAYS = _Always()

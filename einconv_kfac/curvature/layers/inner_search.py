"""The search for layers with a forward pass of their own that multiply by their weight in torch."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from einconv_kfac.curvature.layers.computed.constant_factor import constant_factor
from einconv_kfac.curvature.layers.computed.product import Constant
from einconv_kfac.curvature.layers.inner_calls import (
    BIAS,
    FUNCTIONS,
    KNOWN,
    WEIGHT,
    Arguments,
    InnerCall,
    arguments_of,
    bias_factor,
)
from einconv_kfac.curvature.layers.inner_rules import NO_BIAS, InnerConvRule, InnerLinearRule
from einconv_kfac.curvature.layers.layer_rule import LayerRule

INTERNAL = frozenset(vars(nn.Module()))
"""The attributes that every module has."""
EXAMPLES, SIDE = 2, 9
"""Number of examples of a trial, and of positions in each dimension beyond those of the kernel."""


def inner_rule(module: nn.Module) -> LayerRule | None:
    """Return the rule for the call that a forward pass makes with the module's weight.

    The forward pass of a copy is tried with zeros.

    Args:
        module: A module with a forward pass of its own.

    Returns:
        ``None`` if there is no such call, or there are several.
    """
    known = KNOWN.get(module)
    if known is None:
        known = _tried(module)
        if known is None:
            return None
        KNOWN[module] = known
    bias = NO_BIAS if known.bias is None else BIAS
    weight: Tensor = module._parameters[WEIGHT]  # type: ignore[assignment]
    if not known.options:
        return InnerLinearRule(bias)
    stride, padding, dilation, groups = known.options
    channels = weight.shape[1] * groups, weight.shape[0]
    kernel = tuple(weight.shape[2:])
    return InnerConvRule(*channels, kernel, stride, padding, dilation, groups, bias)


def _tried(module: nn.Module) -> InnerCall | None:
    """Return the call that the forward pass of a copy makes."""
    if isinstance(module, torch.jit.ScriptModule) or module._modules or not _is_simple(module):
        return None
    weight = module._parameters.get(WEIGHT)
    if weight is None or not 2 <= weight.ndim <= 5:
        return None
    recorder = _Trial()
    try:
        trial = _copied(module)
        own: Any = trial._parameters[WEIGHT]
        before = {name: p.detach().clone() for name, p in trial.named_parameters()}
        with _same_random_numbers(weight), torch.enable_grad(), recorder:
            type(module).forward(trial, _zeros(module, weight))
    except Exception:  # it needs other inputs, or cannot be copied
        return None
    changed = {name for name, p in trial.named_parameters() if not torch.equal(p, before[name])}
    factors = [constant_factor(call.weight, own) for call in recorder.calls]
    if len(factors) != 1 or factors[0] is None or not changed <= {WEIGHT}:
        return None
    (call,), parts = recorder.calls, factors[0].parts
    name = _name(trial, parts)
    if changed:
        name = _mask_in_place(trial, own.detach(), before[WEIGHT])
        if not name or parts:
            return None
    seen = None if name else factors[0].value()
    found = Constant(name, in_place=bool(changed), seen=seen)
    bias = bias_factor(trial, call)
    return InnerCall(call.options, found, None if bias is None else Constant(seen=bias.value()))


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a module that are no parameters, by name."""
    own = {**vars(module), **module._buffers}
    return {name: t for name, t in own.items() if isinstance(t, Tensor)}


def _name(module: nn.Module, parts: Sequence[Tensor]) -> str:
    """Return the name of a constant in a module, or an empty string for others and for several."""
    if len(parts) != 1:
        return ""
    known = _constants(module).items()
    found = (
        n for n, t in known if t.data_ptr() == parts[0].data_ptr() and t.shape == parts[0].shape
    )
    return next(found, "")


def _mask_in_place(module: nn.Module, weight: Tensor, before: Tensor) -> str:
    """Return the name of what a module masks its weight with in place, or an empty string.

    Autoregressive models do so. Entries that the mask hides have gradients, as torch does not see
    it, but are zero in each call.

    Args:
        module: The module.
        weight: The weight after a call.
        before: The weight before it, without zeros.
    """
    mask = (weight != 0).to(weight)
    if not torch.equal(weight, before * mask):
        return ""
    for name, tensor in _constants(module).items():
        pairs = zip(reversed(tensor.shape), reversed(weight.shape))
        fits = tensor.ndim <= weight.ndim and all(size in (1, other) for size, other in pairs)
        if fits and torch.equal(tensor.to(weight).expand_as(weight), mask):
            return name
    return ""


def _is_simple(module: nn.Module) -> bool:
    """Return whether a module has plain tensors, and a forward pass that can be tried."""
    own = [*module._parameters.values(), *module._buffers.values()]
    tensors = [each for each in own if each is not None]
    if "forward" in vars(module) or any(map(is_lazy, tensors)):
        return False
    kinds = all(type(each.data) is Tensor and not each.is_meta for each in tensors)
    return kinds and all(each.is_floating_point() for each in module.parameters())


def _copied(module: nn.Module) -> nn.Module:
    """Return a copy of a module with copies of its tensors and attributes, and another weight."""
    result = copy.copy(module)
    attributes = {n: copy.deepcopy(own) for n, own in vars(module).items() if n not in INTERNAL}
    parameters = {
        name: p if p is None else nn.Parameter(p.detach().clone(), p.requires_grad)
        for name, p in module._parameters.items()
    }
    buffers = {n: b if b is None else b.detach().clone() for n, b in module._buffers.items()}
    weight = parameters[WEIGHT]
    assert weight is not None
    values = torch.linspace(1, 2, weight.numel(), dtype=weight.dtype, device=weight.device)
    weight.data.copy_(values.view_as(weight))  # without zeros, so that masks in place show
    vars(result).update(attributes, _parameters=parameters, _buffers=buffers)
    return result


def _zeros(module: Any, weight: Tensor) -> Tensor:
    """Return inputs for a trial."""
    if weight.ndim == 2:
        return weight.new_zeros(EXAMPLES, weight.shape[1])
    channels = weight.shape[1] * int(getattr(module, "groups", 1))
    dilation = getattr(module, "dilation", 1)
    dilations = dilation if isinstance(dilation, tuple) else (dilation,) * (weight.ndim - 2)
    sides = [(size - 1) * d + SIDE for size, d in zip(weight.shape[2:], dilations)]
    return weight.new_zeros(EXAMPLES, channels, *sides)


@contextmanager
def _same_random_numbers(weight: Tensor) -> Iterator[None]:
    """Leave random numbers of torch, Python and numpy after the block as they are before it."""
    devices = [weight.device] if weight.is_cuda else []
    numpy: Any = sys.modules.get("numpy.random")
    others = random.getstate(), None if numpy is None else numpy.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(others[0])
        if numpy is not None:
            numpy.set_state(others[1])


class _Trial(TorchFunctionMode):
    """Records the calls of linear functions."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Arguments] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        y = func(*args, **options)
        if getattr(func, "__name__", "") in FUNCTIONS:
            self.calls.append(arguments_of(func, *args, **options))
        return y

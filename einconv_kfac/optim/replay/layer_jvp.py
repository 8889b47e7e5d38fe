"""Forward-mode differentiation of layers whose outputs were recorded.

Torch's forward mode evaluates a layer together with its tangent. For layers that are linear in
input and parameters, the recorded forward pass has the output, so that only the tangent

    dy = f(dx; W) + f(x; dW, db)

is computed. For a transposed convolution both terms are one call, in which the channels of ``dx``
follow those of ``x``, since torch's own operation is slow for few channels. For batch
normalisation on batch statistics, whose Jacobian in the input is symmetric, the tangent is torch's
backward kernel applied to ``dx``, plus the normalisation of ``x`` with scale and shift ``dW`` and
``db``; torch's own formula takes several times as many passes over the data. The statistics are
those of the recorded forward pass. Group normalisation has contiguous inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm
from torch.nn.modules.conv import _ConvTransposeNd

from einconv_kfac.evaluate import contract_convolution
from einconv_kfac.geometry import conv_geometry
from einconv_kfac.optim.replay.layer_outputs import LINEAR, NORMALIZING, LayerOutputs
from einconv_kfac.optim.replay.substitution import Forwards
from einconv_kfac.optim.replay.tangents import parts
from einconv_kfac.torch_versions import make_dual

Forward: TypeAlias = Callable[..., Tensor]


def batch_norms(modules: Mapping[str, nn.Module]) -> Forwards:
    """Return forward methods of batch normalisation that leave running statistics as they are.

    In training mode the outputs do not depend on these, so that a replay needs no copies of them.
    Subclasses and parts of layers, as for training with quantisation, may read them themselves.

    Args:
        modules: The modules of the model by name.
    """
    return {
        module: partial(_on_batch, module)
        for name, module in modules.items()
        if type(module) in NORMALIZING
        and "forward" not in vars(module)
        and not _is_in_layer(name, modules)
    }


def _is_in_layer(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Return whether the module that contains another one has parameters of its own."""
    parent = modules.get(name.rpartition(".")[0]) if name else None
    return parent is not None and any(p is not None for p in parent._parameters.values())


def _on_batch(module: Any, x: Tensor) -> Tensor:
    """Return the output of batch normalisation without a change of its buffers."""
    if not module.training:
        output: Tensor = type(module).forward(module, x)
        return output
    return batch_norm(x, None, None, module.weight, module.bias, True, 0.0, module.eps)


def layer_jvps(modules: Collection[nn.Module], outputs: LayerOutputs) -> Forwards:
    """Return forward methods of layers that compute tangents as above.

    Args:
        modules: The modules of the model.
        outputs: The outputs of the recorded forward pass, which is about to be replayed.
    """
    known = outputs.by_module()
    forwards: Forwards = {}
    for module in modules:
        if type(module) in LINEAR and module in known:
            forwards[module] = _linear(module, iter(known[module]))
        elif type(module) in NORMALIZING and module.training:
            forwards[module] = _normalizing(module, iter(known.get(module, ())))
        elif isinstance(module, nn.GroupNorm):
            forwards[module] = _contiguous(module)
    return forwards


def _contiguous(module: Any) -> Forward:
    """Return the forward method of a module for inputs that are made contiguous.

    Torch's forward mode of group normalisation fails for images that are stored channels last.
    """
    ordinary = type(module).forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output: Tensor = ordinary(module, x.contiguous(), *args, **kwargs)
        return output

    return forward


def _linear(module: Any, outputs: Iterator[Tensor | None]) -> Forward:
    """Return the forward method of a linear module with recorded outputs."""
    ordinary = type(module).forward

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        output = next(outputs, None)
        if output is None or len(args) != 1 or kwargs:
            recomputed: Tensor = ordinary(module, *args, **kwargs)
            return recomputed
        tangent = _linear_tangent(module, args[0], output)
        return output if tangent is None else make_dual(output, tangent)

    return forward


def _linear_tangent(module: Any, x: Tensor, output: Tensor) -> Tensor | None:
    """Return ``dy``, or ``None`` where neither parameters nor input have a tangent."""
    weight, d_weight = parts(module.weight)
    _, d_bias = parts(module.bias)
    x, dx = parts(x)
    if d_weight is None and d_bias is not None:
        d_weight = torch.zeros_like(weight)
    if d_weight is not None and dx is not None and _transposes_alone(module, weight, x, output):
        y = _transposed(module, torch.cat([d_weight, weight]), torch.cat([x, dx], 1), output)
        return y if d_bias is None else y.add_(d_bias.reshape(-1, *(1,) * (y.ndim - 2)))
    tangent = None if d_weight is None else _evaluated(module, d_weight, d_bias, x)
    if dx is not None:
        through = _evaluated(module, weight, None, dx)
        tangent = through if tangent is None else tangent.add_(through)
    return tangent


def _transposes_alone(module: Any, weight: Tensor, x: Tensor, output: Tensor) -> bool:
    """Return whether a layer is a transposed convolution of one group, in one data type."""
    is_one = isinstance(module, _ConvTransposeNd) and module.groups == 1
    return is_one and x.ndim == weight.ndim and x.dtype == weight.dtype == output.dtype


def _transposed(module: Any, weight: Tensor, x: Tensor, output: Tensor) -> Tensor:
    """Return a transposed convolution with a module's options, shaped like an output."""
    spatial = module.kernel_size, module.stride, module.padding, module.dilation
    return contract_convolution(conv_geometry(output.shape[2:], *spatial), "x", weight, x)


def _evaluated(module: Any, weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    """Return the output of a linear module for other parameters."""
    places = {name: _place(module, name) for name in ("weight", "bias")}
    before = {name: place[name] for name, place in places.items()}
    places["weight"]["weight"], places["bias"]["bias"] = weight, bias
    try:
        result: Tensor = type(module).forward(module, x)
    finally:
        for name, place in places.items():
            place[name] = before[name]
    return result


def _place(module: Any, name: str) -> dict[str, Any]:
    """Return where a module has a tensor; a hook that computes it makes it a plain attribute."""
    places = vars(module), module._parameters, module._buffers
    return next(place for place in places if name in place)


def _normalizing(module: Any, statistics: Iterator[Tensor | None]) -> Forward:
    """Return the forward method of batch normalisation on batch statistics."""

    def forward(x: Tensor) -> Tensor:
        data, dx = parts(x)
        weight, d_weight = parts(module.weight)
        bias, d_bias = parts(module.bias)
        recorded = next(statistics, None)
        if dx is None or not module.training or weight is None or weight.dtype != data.dtype:
            return _on_batch(module, x)
        mean, scale = _batch_statistics(module, data) if recorded is None else recorded
        variance = scale.square().reciprocal_().sub_(module.eps)

        def normalized(by: Tensor, shift: Tensor | None) -> Tensor:
            return torch.native_batch_norm(data, by, shift, mean, variance, False, 0, module.eps)[0]

        tangent, *_ = torch.ops.aten.native_batch_norm_backward(
            dx, data, weight, None, None, mean, scale, True, module.eps, [True, False, False]
        )
        if d_weight is not None or d_bias is not None:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
            tangent = tangent.add_(normalized(d_weight, d_bias))
        return make_dual(normalized(weight, bias), tangent)

    return forward


def _batch_statistics(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of a batch."""
    _, mean, scale = torch.native_batch_norm(x, None, None, None, None, True, 0, module.eps)
    return mean, scale

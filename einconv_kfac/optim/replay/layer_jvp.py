"""Forward-mode differentiation that computes no layer's output twice.

Torch's forward mode evaluates a layer together with its tangent. For layers that are linear in
input and parameters, the output is known from the recorded forward pass, so that the tangent

    dy = f(dx; W) + f(x; dW, db)

is all that is left to compute. For batch normalisation on batch statistics, whose Jacobian in
the input is symmetric, the tangent is that of torch's backward kernel at ``dx``, plus the
normalisation of ``x`` with scale and shift ``dW`` and ``db``; torch's own formula takes several
times as many passes over the data. The statistics are those of the recorded forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

Kept: TypeAlias = dict[nn.Module, list[tuple[Tensor, int]]]
"""Outputs by module, in the order of its calls, with the version at which they were right; for
batch normalisation the mean and the inverse standard deviation, ``[2, c]``."""

Forward: TypeAlias = Callable[[Tensor], Tensor]

LINEAR = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)
"""Modules that are linear in their input and in their parameters; subclasses may not be."""
NORMALIZING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_NODES = ("NativeBatchNorm", "CudnnBatchNorm")


def keep_output(kept: Kept, module: nn.Module, output: Tensor) -> None:
    """Note an output or its statistics, unless activations are checkpointed."""
    if torch._C._autograd._top_saved_tensors_default_hooks(True) is not None:
        return
    if type(module) in LINEAR:
        kept.setdefault(module, []).append((output.detach(), output._version))
    elif (statistics := _statistics(output)) is not None:
        kept.setdefault(module, []).append((statistics, 0))


def _statistics(output: Tensor) -> Tensor | None:
    """Return what torch's backward pass of batch normalisation keeps, if there is such."""
    node = output.grad_fn
    saved = [getattr(node, f"_saved_result{index}", None) for index in (1, 2)]
    if not str(node and node.name()).startswith(_NODES) or not all(
        isinstance(part, Tensor) and part.ndim == 1 and len(part) for part in saved
    ):
        return None
    return torch.stack([part.detach() for part in saved if isinstance(part, Tensor)])


@contextmanager
def quick_tangents(model: nn.Module, kept: Kept) -> Iterator[None]:
    """Make layers compute their tangents as above inside the block.

    Args:
        model: The model.
        kept: The outputs of its recorded forward pass, which is about to be repeated.
    """
    changed = []
    for module in model.modules():
        if "forward" in vars(module):
            continue
        if type(module) in LINEAR and module in kept:
            module.forward = _linear(module, iter(kept[module]))
        elif type(module) in NORMALIZING and module.training:
            module.forward = _normalizing(module, iter(kept.get(module, [])))
        else:
            continue
        changed.append(module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


@contextmanager
def portable_recurrence(model: nn.Module) -> Iterator[None]:
    """Run recurrent layers by torch's own operations inside the block.

    Those of oneDNN and cuDNN have no forward mode, and can be differentiated once only.
    """
    changed = [m for m in model.modules() if isinstance(m, nn.RNNBase) and "forward" not in vars(m)]
    for module in changed:
        module.forward = partial(_plain_recurrence, module)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def _plain_recurrence(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the forward pass of a recurrent layer without oneDNN and cuDNN."""
    mkldnn, cudnn = torch._C._get_mkldnn_enabled(), torch._C._get_cudnn_enabled()
    torch._C._set_mkldnn_enabled(False)  # `torch.backends.mkldnn.flags` warns of Intel GPUs
    torch._C._set_cudnn_enabled(False)
    try:
        return type(module).forward(module, *args, **kwargs)
    finally:
        torch._C._set_mkldnn_enabled(mkldnn)
        torch._C._set_cudnn_enabled(cudnn)


def _linear(module: Any, outputs: Iterator[tuple[Tensor, int]]) -> Forward:
    """Return the forward pass of a linear module whose outputs are known."""
    ordinary = type(module).forward

    def at(weight: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        before = dict(module._parameters)
        module._parameters.update(weight=weight, bias=bias)
        try:
            result: Tensor = ordinary(module, x)
        finally:
            module._parameters.update(before)
        return result

    def forward(*args: Tensor, **kwargs: Tensor) -> Tensor:
        output, version = next(outputs, (None, 0))
        if output is None or output._version != version or len(args) != 1 or kwargs:
            unknown: Tensor = ordinary(module, *args, **kwargs)
            return unknown
        weight, d_weight = _parts(module.weight)
        _, d_bias = _parts(module.bias)
        x, dx = _parts(args[0])
        if d_weight is None and d_bias is not None:
            d_weight = torch.zeros_like(weight)
        tangent = None if d_weight is None else at(d_weight, d_bias, x)
        if dx is not None:
            through = at(weight, None, dx)
            tangent = through if tangent is None else tangent.add_(through)
        return output if tangent is None else _dual(output, tangent)

    return forward


def _normalizing(module: Any, known: Iterator[tuple[Tensor, int]]) -> Forward:
    """Return the forward pass of batch normalisation on batch statistics."""
    ordinary = type(module).forward

    def forward(x: Tensor) -> Tensor:
        data, dx = _parts(x)
        weight, d_weight = _parts(module.weight)
        bias, d_bias = _parts(module.bias)
        statistics, _ = next(known, (None, 0))
        if dx is None or weight is None or weight.dtype != data.dtype:
            unknown: Tensor = ordinary(module, x)
            return unknown
        mean, scale = _own_statistics(module, data) if statistics is None else statistics

        def normalized(by: Tensor, shift: Tensor | None) -> Tensor:
            variance = scale.square().reciprocal() - module.eps
            return torch.native_batch_norm(data, by, shift, mean, variance, False, 0, module.eps)[0]

        tangent, *_ = torch.ops.aten.native_batch_norm_backward(
            dx, data, weight, None, None, mean, scale, True, module.eps, [True, False, False]
        )
        if d_weight is not None or d_bias is not None:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight
            tangent = tangent.add_(normalized(d_weight, d_bias))
        return _dual(normalized(weight, bias), tangent)

    return forward


def _own_statistics(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of a batch."""
    _, mean, scale = torch.native_batch_norm(x, None, None, None, None, True, 0, module.eps)
    return mean, scale


def _parts(tensor: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return value and tangent."""
    if tensor is None:
        return None, None  # type: ignore[return-value]
    value, tangent = forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
    return value, tangent


def _dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Join value and tangent."""
    dual: Tensor = forward_ad.make_dual(value, tangent)  # type: ignore[no-untyped-call]
    return dual

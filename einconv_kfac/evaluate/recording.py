"""Whether torch records operations in a graph, and whether it transforms them."""

from __future__ import annotations

import sys

import torch


def is_recorded() -> bool:
    """Return whether operations are compiled, or seen by a mode that traces or counts them.

    ``torch.func.functionalize`` is such a mode: it has no rule for functions with derivatives of
    their own.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    functionalize = torch._C._functorch.TransformType.Functionalize
    levels = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == functionalize for level in levels)


def is_transformed() -> bool:
    """Return whether forward mode or a transform of ``torch.func`` is active."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0
    return forward_mode or torch._C._are_functorch_transforms_active()


def is_exported_to_onnx() -> bool:
    """Return whether ``torch.onnx.export`` records, which has no operators but torch's own."""
    if not torch.compiler.is_compiling() or torch.compiler.is_dynamo_compiling():
        return False
    return _is_in_onnx_export()


def takes_kernels(simplify: bool) -> bool:
    """Return whether kernels compute a convolution, and not the contraction of its network.

    ONNX has torch's operators alone. Dynamo (``torch.compile``, strict export) cannot trace the
    search for the order of a contraction.

    Args:
        simplify: Whether kernels are wanted where there is a choice.
    """
    if torch.compiler.is_dynamo_compiling():
        return True
    return simplify and not is_exported_to_onnx()


def is_traced_for_onnx() -> bool:
    """Return whether ``torch.onnx.export(..., dynamo=False)`` records, without changes of views."""
    is_traced: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return is_traced and _is_in_onnx_export()


def _is_in_onnx_export() -> bool:
    return "torch.onnx" in sys.modules and torch.onnx.is_in_onnx_export()

"""What differs between the versions of torch that are supported; no other file asks for one."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import GradientEdge, disable_saved_tensors_hooks, get_gradient_edge


def load_forward_mode() -> bool:
    """Make torch compile forward-mode formulas of rare operators; return if that was not done yet.

    That takes a third of a second, which `make_dual` leaves out.
    """
    before = _load_forward_mode.cache_info().currsize
    _load_forward_mode()
    return not before


@cache
def _load_forward_mode() -> None:
    """Compile the formulas, and hide torch's warning about the compiler.

    The first dual number of a process calls ``torch.jit.script``, which warns with a
    ``DeprecationWarning``, and in the newest versions with a ``FutureWarning``.
    """
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.filterwarnings("ignore", r".torch\.jit\.script.")
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))  # type: ignore[no-untyped-call]


def make_dual(value: Tensor, tangent: Tensor) -> Tensor:
    """Return a value with a tangent, without `load_forward_mode`.

    Operators that need it raise a ``NotImplementedError``.
    """
    level: int = forward_ad._current_level
    make: Any = torch._VF._make_dual
    found: Tensor = make(value, tangent, level=level)
    return found


def packs_saved_tensors() -> bool:
    """Return whether hooks pack what operations save for the backward pass, as checkpoints do."""
    top: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    if top is not None:
        return top(True) is not None
    try:  # torch 2.6 has no such question; disabling fails where there are hooks
        with disable_saved_tensors_hooks("Asked whether there are hooks."):
            return False
    except RuntimeError:
        return True


def is_packed(node: Any) -> bool:
    """Return whether hooks packed a tensor that an operation saved for its backward pass."""
    kind: Any = type(node)
    return any(
        _has_hooks(each) for name in _saved_names(kind) for each in _listed(getattr(node, name))
    )


@cache
def _saved_names(kind: Any) -> list[str]:
    """Return the attributes of a kind of node that have the tensors it saved."""
    return [name for name in dir(kind) if name.startswith("_raw_saved_")]


def _listed(saved: Any) -> Any:
    """Return one tensor or several that were saved, as several."""
    return saved if isinstance(saved, (list, tuple)) else [saved]


def _has_hooks(saved: Any) -> bool:
    """Return whether hooks packed a tensor that was saved."""
    if hasattr(saved, "unpack_hook"):
        return saved.unpack_hook is not None
    try:  # before torch 2.9 there is no such question; there is one pair of hooks at most
        saved.register_hooks(lambda tensor: tensor, lambda tensor: tensor)
    except RuntimeError as error:
        return "already been set" in str(error)
    return False


def gradient_edge(tensor: Tensor) -> GradientEdge:
    """Return where the gradient of a tensor is computed; torch 2.6 asks a view with a graph."""
    with torch.enable_grad():
        return get_gradient_edge(tensor)


def all_gather_single(*args: Any, **kwargs: Any) -> Any:
    """Gather equal parts of all workers into one tensor; the name is that of torch 2.13."""
    from torch import distributed  # noqa: PLC0415 - heavy

    gather: Any = getattr(distributed, "all_gather_single", None)
    return (distributed.all_gather_into_tensor if gather is None else gather)(*args, **kwargs)


def is_fully_sharded(model: nn.Module) -> bool:
    """Return whether ``fully_shard`` was called on a model; some builds of torch have none."""
    try:
        from torch.distributed.fsdp import FSDPModule  # noqa: PLC0415
    except ImportError:
        return False
    return isinstance(model, FSDPModule)


def parameter_groups(module: Any) -> list[Any]:
    """Return the groups of parameters that ``fully_shard`` gathers together for a module."""
    state = module._get_fsdp_state()
    found = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
    return [group for group in found if group is not None]


def multiplies_in_tf32() -> bool:
    """Return whether CUDA rounds the operands of products in float32 to TF32.

    From torch 2.9 on the older of the two settings may raise an error.
    """
    setting = torch.backends.cuda.matmul
    if hasattr(torch.backends, "fp32_precision"):
        return bool(setting.fp32_precision == "tf32")
    return bool(setting.allow_tf32)

"""Hooks of users on gradients, which a replay leaves out.

They change or record the gradients of a script's own backward passes. A Jacobian-vector product is
that of the function which the model computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

Outputs: TypeAlias = tuple[Tensor, ...]


class _WithoutTensorHooks(TorchFunctionMode):
    """A context in which users' hooks are not registered on tensors, nor gradients retained."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is Tensor.retain_grad:
            return None
        if func is Tensor.register_hook and not _is_torch(kwargs.get("hook", args[-1])):
            return RemovableHandle(OrderedDict())
        return func(*args, **kwargs)


@contextmanager
def without_gradient_hooks(model: nn.Module) -> Iterator[None]:
    """Leave out hooks on gradients of tensors and modules inside the block; torch's own stay.

    Args:
        model: The model that is called in it.
    """
    kept: list[tuple[dict[str, Any], str, Any]] = []
    for module in model.modules():
        for name in ("_backward_hooks", "_backward_pre_hooks"):
            own, hooks = vars(module), vars(module).get(name)
            if hooks:
                kept.append((own, name, hooks))
                own[name] = OrderedDict((k, h) for k, h in hooks.items() if _is_torch(h))
    try:
        with _WithoutTensorHooks():
            yield
    finally:
        for own, name, hooks in kept:
            own[name] = hooks


def evaluated_without_hooks(
    run: Callable[[], Outputs],
    model: nn.Module,
    is_repeated: Callable[[Outputs], bool],
    check: Callable[[Outputs], None],
) -> Outputs:
    """Return outputs without hooks on gradients, or with them if the outputs depend on them.

    Args:
        run: Calls the model.
        model: The model.
        is_repeated: Whether outputs are the recorded ones.
        check: Raises an error if they are not.
    """
    try:
        with without_gradient_hooks(model):
            outputs = run()
        if is_repeated(outputs):
            return outputs
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        pass
    outputs = run()
    if not is_repeated(outputs):
        check(outputs)
    return outputs


def _is_torch(hook: Any) -> bool:
    """Return whether a hook is one of torch, as for models that are divided among workers."""
    return str(getattr(getattr(hook, "func", hook), "__module__", "")).startswith("torch.")

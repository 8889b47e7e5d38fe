"""Hooks on the calls of a model, or of its parts where a script calls these."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.jit import ScriptModule
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.module_hooks import InactiveHook, ModuleHook, is_compiling

REDIRECTION = "_ForwardRedirection."
"""In the name of what Lightning puts in the place of ``forward`` for one call."""


class Hook(ModuleHook):
    """Calls a method of an object while the object exists; copies of the hook do nothing.

    Args:
        method: The method, bound to the object.
    """

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = weakref.WeakMethod(method)

    def __call__(self, *args: Any) -> Any:
        """Call the method, unless torch is compiling."""
        method = None if is_compiling() else self._method()
        return None if method is None else method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return InactiveHook, ()


class CallHooks:
    """The hooks before and after calls of a model.

    Most scripts call the whole model. Some call parts of it, such as an encoder and a decoder;
    these are watched until the end of the first step, and after it if one of them was called.

    Args:
        model: The model.
        before: The hook before a call, which also takes keyword arguments.
        after: The hook after it.

    Attributes:
        handles: The handles of all hooks.
    """

    def __init__(self, model: nn.Module, before: Hook, after: Hook) -> None:
        self._model, self._before, self._after = model, before, after
        self._last: dict[nn.Module, RemovableHandle] = {}
        self._names = {model: ""}
        self._parts: list[RemovableHandle] = []
        self._calls_parts = False
        self.handles = self._attached(model)

    def watch_parts_(self, losses: Iterable[nn.Module]) -> None:
        """Watch the parts of the model that have parameters.

        Args:
            losses: Modules that are no parts of it.
        """
        left_out = set(losses)
        for name, part in self._model.named_modules():
            if isinstance(part, ScriptModule) or part in left_out or not name:
                continue  # torch attaches no hooks to it
            if any(True for _ in part.parameters()):
                self._names[part] = name
                self._parts += self._attached(part)
        self.handles += self._parts

    def _attached(self, module: nn.Module) -> list[RemovableHandle]:
        """Attach the hooks of a module, and return their handles."""
        self._last[module] = module.register_forward_hook(self._after, always_call=True)
        first = module.register_forward_pre_hook(self._before, prepend=True, with_kwargs=True)
        return [first, self._last[module]]

    def may_begin(self, module: nn.Module) -> bool:
        """Return whether a call is the script's own.

        Checkpoints call parts in backward passes, and Lightning calls a step of the script, which
        calls parts of the model, in place of the model's ``forward``.
        """
        forward = module.__dict__.get("forward")
        if REDIRECTION in getattr(forward, "__qualname__", ""):
            return False
        return module is self._model or torch._C._current_graph_task_id() == -1

    def begin_(self, module: nn.Module) -> None:
        """Begin the outermost call of a module: the hook after it becomes the last one."""
        self._calls_parts |= module is not self._model
        hooks: Any = module._forward_hooks
        if self._last[module].id in hooks:
            hooks.move_to_end(self._last[module].id)  # behind hooks that came later

    def end_step_(self) -> None:
        """Leave the parts alone from now on, unless one of them was called by itself."""
        if not self._calls_parts:
            detach(self._parts)
        self._parts = []

    def name_of(self, module: nn.Module) -> str:
        """Return the name of a part; the whole model has none."""
        return self._names[module]


def detach(handles: Iterable[RemovableHandle]) -> None:
    """Remove hooks."""
    for handle in handles:
        handle.remove()

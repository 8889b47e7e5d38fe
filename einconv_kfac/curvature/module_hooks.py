"""Hooks of modules, and what they do while torch compiles or traces the module."""

from __future__ import annotations

from functools import partial

import torch

_UNSCRIPTED = (
    "`torch.jit.script` compiles the hooks of a module, and those of einconv_kfac cannot be. Call "
    "`optimizer.remove_hooks()` before it, or script another module with the same parameters, "
    "`other.load_state_dict(model.state_dict())`."
)


def is_compiling() -> bool:
    """Return whether torch compiles or traces what runs; hooks record nothing then."""
    return torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None


class ModuleHook:
    """A hook of a module. Its name, which TorchScript asks for, is missing with a reason."""

    @property
    def __name__(self) -> str:
        raise AttributeError(_UNSCRIPTED)


class PartialHook(partial[None], ModuleHook):
    """A hook that calls a function with further arguments."""


class InactiveHook(ModuleHook):
    """A hook that does nothing, which copies of a model have in place of the original."""

    def __call__(self, *_: object) -> None:
        """Ignore the arguments of a hook."""

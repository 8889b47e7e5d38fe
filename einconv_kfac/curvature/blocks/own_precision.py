"""Methods that compute in the precision of their tensors, also inside of autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from types import FunctionType
from typing import Any, TypeVar

import torch

Class = TypeVar("Class", bound=type[Any])
DEVICES = ("cpu", "cuda", "xpu", "mps")
"""Types of devices for which autocast may be on."""


def in_own_precision(kind: Class) -> Class:
    """Let the public methods of a class, and its product ``@``, run without autocast.

    Curvature is decomposed and inverted, for which the precision of autocast is too low.
    """
    for name, method in list(vars(kind).items()):
        is_public = not name.startswith("_") or name == "__matmul__"
        if is_public and isinstance(method, FunctionType):
            setattr(kind, name, _without_autocast(method))
    return kind


def _without_autocast(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a method that runs without autocast."""

    @wraps(method)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch._C._is_any_autocast_enabled():
            return method(*args, **kwargs)
        with autocast_disabled():
            return method(*args, **kwargs)

    return run


@contextmanager
def autocast_disabled(devices: Iterable[str] = DEVICES) -> Iterator[None]:
    """Disable autocast inside the block, on those devices where it is on.

    Args:
        devices: Types of devices.
    """
    with ExitStack() as stack:
        for device in devices:
            if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield

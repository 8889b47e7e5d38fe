"""A call outside of a compiled graph; importing this file imports torch's compiler, in seconds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def _call(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function."""
    return function(*args)


outside_of_graph: Any = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]

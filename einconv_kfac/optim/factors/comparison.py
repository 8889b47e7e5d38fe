"""What optimizers on several workers must have in common from the beginning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from einconv_kfac.distributed.workers import Same
from einconv_kfac.optim.factors.curvature import RunningCurvature

_LOCAL = ("model", "exclude", "loss_fn")
"""Arguments that are objects of each worker's own; `layers` says what ``exclude`` leaves."""


def check_alike(curvature: RunningCurvature, settings: Mapping[str, Any]) -> None:
    """Raise a ``RuntimeError`` on all workers if models or hyper-parameters differ.

    Args:
        curvature: The running curvature, which covers its layers.
        settings: Other arguments by name.
    """

    def same() -> Same:
        named = curvature.model.named_parameters()
        own = {n: v for n, v in curvature.arguments().items() if n not in _LOCAL}
        return Same(
            {
                "parameters": [(n, tuple(p.shape), p.dtype, p.requires_grad) for n, p in named],
                "layers with factors": sorted(curvature.layers),
                **{f"`{name}`": _described(value) for name, value in {**own, **settings}.items()},
            }
        )

    curvature.workers.agree(torch.ones(()), "are all alike", same)


def _described(value: Any) -> object:
    """Return a value whose text is the same on all workers: of functions and rules, the name."""
    if isinstance(value, torch.dtype):
        return str(value)
    is_object = callable(value) or type(value).__module__ != "builtins"
    return getattr(value, "__qualname__", type(value).__qualname__) if is_object else value

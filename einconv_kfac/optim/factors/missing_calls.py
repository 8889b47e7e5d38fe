"""Errors for layers whose factors are due, and of which no calls were recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from einconv_kfac.optim.factors.compiled_parts import advice, compiled_parts
from einconv_kfac.optim.replay.unknown_operations import NO_LOSS


def calls_error(model: nn.Module, missing: Sequence[str], *, has_batches: bool) -> RuntimeError:
    """Return the error for trained layers without recorded calls.

    Args:
        model: The model.
        missing: Names of the layers.
        has_batches: Whether any loss was recorded.
    """
    if not has_batches:
        return RuntimeError(NO_LOSS)
    names = ", ".join(f"'{name}'" for name in sorted(missing))
    return RuntimeError(
        f"The factors of {names} need calls that the loss depends on, got none, though "
        f"there is a gradient. {advice(compiled_parts(model, missing))}"
    )

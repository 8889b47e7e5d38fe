"""Errors for layers whose factors are due, and of which no calls were recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from einconv_kfac.distributed.stored import local_of, stored_of
from einconv_kfac.optim.factors.compiled_parts import advice, compiled_parts
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.unknown_operations import NO_LOSS, OTHER_LAYERS

WEIGHTS_ALONE = (
    "The loss uses their weights themselves, as `layer.weight`, or in a copy of the layers. Where "
    "that is meant, leave them to the fallback: exclude={given}. An inner loop and a solver "
    "(`odeint`, not `odeint_adjoint`) belong into `forward` of a module that has the model as a "
    "part: pass that module."
)


def is_trained(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has a gradient that is not zero."""
    gradient = stored_of(parameter).grad
    return gradient is not None and bool(local_of(gradient).any())


def calls_error(model: nn.Module, missing: Sequence[str], batches: Sequence[Batch]) -> RuntimeError:
    """Return the error for trained layers without recorded calls.

    Args:
        model: The model.
        missing: Names of the layers.
        batches: The recorded losses.
    """
    if not batches:
        return RuntimeError(NO_LOSS)
    names = ", ".join(f"'{name}'" for name in sorted(missing))
    used = {name.rpartition(".")[0] for batch in batches for name in batch.parameters}
    alone = WEIGHTS_ALONE.format(given=sorted(missing)) if used.issuperset(missing) else ""
    need = f"The factors of {names} need calls that the loss depends on, got none"
    need += ", though there is a gradient."
    if all(batch.is_assumed for batch in batches):
        return RuntimeError(f"{need} {alone}" if alone else OTHER_LAYERS.format(names=names))
    parts = need, alone, advice(compiled_parts(model, missing))
    return RuntimeError(" ".join(part for part in parts if part))

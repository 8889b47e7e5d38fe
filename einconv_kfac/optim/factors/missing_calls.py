"""Errors for layers whose factors are due, and of which no calls were recorded."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from einconv_kfac.distributed.stored import local_of, stored_of
from einconv_kfac.optim.factors.compiled_parts import advice, compiled_parts
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.unknown_operations import NO_LOSS, OTHER_LAYERS

WEIGHTS_ALONE = (
    "The loss uses the weights of {names} themselves, as `layer.weight`, and does not depend on "
    "calls of these layers, so that they have no factors. Leave them to the fallback: "
    "exclude={given}."
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
    if used.issuperset(missing):
        return RuntimeError(WEIGHTS_ALONE.format(names=names, given=sorted(missing)))
    if all(batch.is_assumed for batch in batches):
        return RuntimeError(OTHER_LAYERS.format(names=names))
    return RuntimeError(
        f"The factors of {names} need calls that the loss depends on, got none, though "
        f"there is a gradient. {advice(compiled_parts(model, missing))}"
    )

"""Checks that a recorded batch can be replayed, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.loss_input import OUTER
from einconv_kfac.optim.replay.subsample import check_separate
from einconv_kfac.optim.replay.unknown_operations import refusal_between, refusal_of

OVERWRITTEN = "Pass a copy (`.clone()`)"
OVERWRITING = (
    "The model itself overwrote it: pass inplace=False to its first layer, or begin its `forward` "
    "with `x = x.clone()`"
)
"""Remedies where arguments were overwritten, after the call of the model or by it."""
REPEATED_ERROR = 0.1
"""Largest relative difference between an output and its repetition, in low precision."""


def check_batch(model: nn.Module, batch: Batch, *, compiled: bool) -> None:
    """Check whether a batch or its subset can be replayed, without running the model.

    Args:
        model: The model.
        batch: The batch.
        compiled: Whether the recorded calls went through ``torch.compile``.

    Raises:
        RuntimeError: If it cannot.
    """
    if batch.refusal is not None:
        raise RuntimeError(batch.refusal)
    assert batch.loss_model is not None
    inner = [i for f in batch.forwards for i in f.inputs if not isinstance(i, OUTER)]
    if inner and compiled:
        raise RuntimeError(
            "`loss_fn` must be called outside of a compiled model when adaptive=True, got a "
            "call inside, where compiled code skips the hooks that record it. Compile the "
            "part before the loss and pass that here, or pass adaptive=False."
        )
    if others := [each.call.replaced for each in batch.forwards if each.call.replaced]:
        raise RuntimeError(
            "The model must be called with its own parameters when adaptive=True, got another "
            f"tensor in place of '{others[0]}', as by `torch.func.functional_call`. Make that call "
            "in the `forward` of a module that has the model as a part, and pass that module, or "
            "pass adaptive=False."
        )
    if unknown := batch.loss_model.unknown():
        raise RuntimeError(refusal_of(unknown))
    _check_chained(model, batch.forwards)
    for versions in (*(each.call.versions for each in batch.forwards), batch.versions):
        if (changed := versions.changed()) is not None:
            raise RuntimeError(
                "What the model and the loss are called with must not change before the step when "
                f"adaptive=True, got {changed}, which was overwritten in place. "
                f"{OVERWRITING if versions.during_call else OVERWRITTEN}, or pass adaptive=False."
            )
    if batch.subset is not None:
        check_separate(model)
        batch.curvature_forwards()


def check_weights(weights: Sequence[float]) -> None:
    """Raise a ``RuntimeError`` if the weight of a loss in the objective is negative."""
    if any(weight < 0 for weight in weights):
        raise RuntimeError(
            "The loss that `loss_fn` computes must be minimised when adaptive=True, got one with a "
            "negative weight. Write `loss = optimizer.observe(loss)` with the negated loss before "
            "`loss.backward()`, or pass adaptive=False."
        )


def _check_chained(model: nn.Module, forwards: Sequence[ForwardPass]) -> None:
    """Raise a ``RuntimeError`` if what stands between calls of the model cannot be replayed."""
    dependent = [each for each in forwards if each.call.chained or each.vectors]
    links = [own.link for each in dependent for own in each.dependences if own.link is not None]
    if unknown := sorted({kind for link in links for kind in link.unknown}):
        raise RuntimeError(refusal_between(unknown))
    if links and any(each.call.has_moved(model) for each in forwards):
        raise RuntimeError(
            "Parameters must not change between the forward pass and the step when adaptive=True "
            "and a call of the model, or a vector that its derivative is taken with, depends on "
            "the model through other operations. Take the step of this optimizer first, or pass "
            "adaptive=False."
        )


def check_repeated(batch: Batch, outputs: Sequence[Tensor]) -> None:
    """Check that the outputs of a replay are the recorded ones.

    Raises:
        RuntimeError: If they differ by more than rounding.
    """
    if is_repeated(batch, outputs):
        return
    if batch.subset is not None:
        raise RuntimeError(
            "The model must treat each example separately when `curvature_fraction` is below 1, "
            "got outputs of a subset that differ from those of the whole batch: a layer mixes "
            "examples, or draws random numbers by other means than nn.Dropout. Pass "
            "curvature_fraction=1."
        )
    raise RuntimeError(
        "The model must repeat its output when a recorded batch is replayed for adaptive=True, "
        "got a different one. Draw random numbers from torch's global generator, numpy's or "
        "`random`, keep state between calls only in buffers or frozen parameters (no attributes, "
        "unless `forward` sets them back at its beginning, in a module that holds the loop over "
        "time), change attributes of modules after the step, and parameters after it or inside of "
        "`torch.no_grad()` (not through `.data`), run attention without cuDNN, or pass "
        "adaptive=False."
    )


def is_repeated(batch: Batch, outputs: Sequence[Tensor]) -> bool:
    """Return whether the outputs of a replay are the recorded ones, up to rounding."""
    flags = repetitions(batch, outputs)
    return flags is not None and (not flags or bool(torch.stack(flags).all()))


def repetitions(batch: Batch, outputs: Sequence[Tensor]) -> list[Tensor] | None:
    """Return whether each output of a replay is the recorded one, up to rounding.

    The host does not wait for the flags. It is ``None`` where an output has another shape.
    """
    precision = [each.call.environment.precision for each in batch.forwards for _ in each.inputs]
    pairs = list(zip(outputs, batch.curvature_outputs(), precision))
    if any(value.shape != expected.shape for value, expected, _ in pairs):
        return None
    return [_is_close(value, expected, eps(value.dtype)) for value, expected, eps in pairs]


def _is_close(value: Tensor, expected: Tensor, eps: float) -> Tensor:
    """Return whether a tensor is another one up to rounding with a machine epsilon."""
    wide = torch.promote_types(expected.dtype, torch.float64)
    expected, value = expected.to(wide), value.detach().to(wide)
    kept = expected.isfinite()
    difference = (value - expected).where(kept, 0)
    allowed = min(10 * eps**0.5, REPEATED_ERROR) * expected.where(kept, 0).norm()
    differs: Tensor = difference.norm() > allowed
    return ~differs

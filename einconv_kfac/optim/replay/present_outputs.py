"""Recorded batches, brought to the present point."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from torch import Tensor, nn

from einconv_kfac.curvature.objective.loss_model import GivenLoss
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.versions import Versions


class Evaluates(Protocol):
    """Evaluates batches anew."""

    def outputs(self, batch: Batch) -> list[Tensor]:
        """Return the outputs that the loss depends on, and the parameters."""

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch."""


def present(batch: Batch, model: nn.Module, replay: Evaluates) -> Batch:
    """Return a batch whose outputs are those of the model with its present parameters.

    Args:
        batch: The batch.
        model: The model.
        replay: Evaluates it where that is needed.

    Raises:
        RuntimeError: If outputs and parameters were both changed.
    """
    return _moved(_restored(batch, model, replay), model, replay)


def _restored(batch: Batch, model: nn.Module, replay: Evaluates) -> Batch:
    """Return a batch with the outputs of the model, if a script changed them in place since."""
    if (written := batch.written.changed()) is None:
        return batch
    if any(each.call.has_moved(model) for each in batch.forwards):
        raise RuntimeError(
            "Outputs of the model must not be changed in place when parameters change before "
            f"the step and adaptive=True, got {written}. Write `out = out / t` in place of "
            "`out /= t`, or `out = out.masked_fill(mask, 0)` in place of `out[mask] = 0`."
        )
    assert batch.loss_model is not None
    outputs = tuple(replay.outputs(batch)[: len(batch.outputs)])
    loss_model = batch.loss_model.at(outputs)
    return replace(batch, outputs=outputs, loss_model=loss_model, written=Versions(()))


def _moved(batch: Batch, model: nn.Module, replay: Evaluates) -> Batch:
    """Return a batch whose outputs are those of the present parameters."""
    if not any(each.call.has_moved(model) for each in batch.forwards):
        return batch
    outputs = tuple(replay.outputs(batch)[: len(batch.outputs)])
    loss, loss_model = replay.batch_loss(batch), batch.loss_model
    assert loss_model is not None
    if isinstance(loss_model, GivenLoss):
        loss_model = loss_model.at(outputs)
    return replace(batch, outputs=outputs, loss=loss, loss_model=loss_model, has_moved=True)

"""Replay of recorded batches: a model and its loss, evaluated and differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

from torch import Tensor, nn

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.jvp import backward_products, forward_products
from einconv_kfac.optim.replay.loss_input import Targets
from einconv_kfac.optim.replay.subsample import check_separate
from einconv_kfac.optim.vectors import Direction

REPEATED_ERROR = 0.1
"""Largest relative difference between an output and its repetition, in low precision."""


class Replay:
    """Evaluates a model and its loss on recorded batches, and differentiates the model there.

    Parameters that are not given have their present values.

    Args:
        model: The model.
        loss_fn: The loss module.
        paused: Returns a context in which hooks record nothing.
        compiled: Whether the recorded calls went through ``torch.compile``.

    Attributes:
        forward_mode: Whether Jacobian-vector products use forward mode; set to ``False`` where
            an operator of the model has none.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: nn.Module,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        compiled: bool = False,
    ) -> None:
        self.forward_mode = True
        self._checked = False
        self._model = model
        self._loss_fn = loss_fn
        self._paused = paused
        self._compiled = compiled

    def output(self, batch: Batch, parameters: Direction, *, subset: bool = False) -> Tensor:
        """Return the argument of the loss, ``[n, ...]``, or ``[k, ...]`` for the batch's subset.

        Args:
            batch: The batch.
            parameters: Parameters that take other values, by name.
            subset: Whether to evaluate the examples that the curvature is computed from.
        """
        forward = batch.curvature_forward if subset else batch.forward
        assert forward is not None
        with self._paused():
            return forward.run(self._model, parameters)

    def loss(self, output: Tensor, target: Any) -> Tensor:
        """Return the loss of an output ``[n, ...]`` and a target (or `Targets`)."""
        with self._paused():
            return self._loss(output, target)

    def batch_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a batch for the present parameters."""
        assert batch.forward is not None
        with self._paused():
            return self._loss(batch.forward.run(self._model, {}), batch.target)

    def jacobian_products(
        self, batch: Batch, parameters: Direction, directions: Sequence[Direction]
    ) -> list[Tensor]:
        """Return ``J d``, ``[k, ...]`` for the batch's subset, for each direction ``d``.

        Args:
            batch: The batch.
            parameters: The present parameters by name.
            directions: The directions.

        Raises:
            RuntimeError: If the model can be differentiated neither in forward mode nor by two
                backward passes, or, in the latter case, does not repeat its output.
        """
        with self._paused():
            if self.forward_mode:
                run = partial(batch.curvature_forward.run, self._model, tangents=True)
                try:
                    return forward_products(run, parameters, directions)
                except NotImplementedError:
                    self.forward_mode = False
            return backward_products(partial(self._repeated, batch), parameters, directions)

    def check(self, batches: Sequence[Batch], parameters: Direction, direction: Direction) -> None:
        """Check that batches can be replayed; checks that run the model are made only once.

        These are that the model repeats its output, and that `jacobian_products` succeeds.

        Args:
            batches: Batches with forward passes, at least one.
            parameters: The present parameters by name.
            direction: Any direction.

        Raises:
            RuntimeError: If one of them cannot be replayed.
        """
        for batch in batches:
            self._check_batch(batch)
        if not self._checked:
            with self._paused():
                self._repeated(batches[0], {})
            self.jacobian_products(batches[0], parameters, [direction])
            self._checked = True

    def _check_batch(self, batch: Batch) -> None:
        """Check whether a batch or its subset can be replayed, without running the model."""
        assert batch.forward is not None
        if batch.forward.loss_input.is_inside and self._compiled:
            raise RuntimeError(
                "`loss_fn` must be called outside of a compiled model when adaptive=True, got a "
                "call inside, where compiled code skips the hooks that record it. Compile the "
                "part before the loss and pass that here, or pass adaptive=False."
            )
        if batch.subset is not None:
            check_separate(self._model)
            _ = batch.curvature_forward

    def _loss(self, output: Tensor, target: Any) -> Tensor:
        targets = target if isinstance(target, Targets) else (target,)
        loss: Tensor = self._loss_fn(output, *targets)
        return loss

    def _repeated(self, batch: Batch, parameters: Direction) -> Tensor:
        """Return the argument of the loss for the subset; it must be the recorded one."""
        output = batch.curvature_forward.run(self._model, parameters)
        _check_repeated(batch, output)
        return output


def _check_repeated(batch: Batch, output: Tensor) -> None:
    """Check that the output of a replay is the recorded output.

    Raises:
        RuntimeError: If it differs by more than rounding.
    """
    eps = batch.curvature_forward.call.environment.precision(output.dtype)
    expected, value = batch.curvature_output.double(), output.detach().double()
    allowed = min(10 * eps**0.5, REPEATED_ERROR) * expected.norm()
    if value.shape == expected.shape and not bool((value - expected).norm() > allowed):
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
        "got a different one. Draw random numbers from torch's global generator, keep state "
        "between calls only in buffers, change no output in place, run attention without cuDNN, "
        "or pass adaptive=False."
    )

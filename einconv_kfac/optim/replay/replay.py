"""Replay of recorded batches: a model and its loss, evaluated and differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.objective.loss_model import Expansion, GivenLoss
from einconv_kfac.optim.replay.adjoint import Adjoint, GradientSwitch
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.checks import (
    check_batch,
    check_repeated,
    is_repeated,
    repetitions,
)
from einconv_kfac.optim.replay.forward import ForwardPass, run_all
from einconv_kfac.optim.replay.joint import joined
from einconv_kfac.optim.replay.jvp import Tangents, backward_products, forward_products
from einconv_kfac.optim.replay.versions import Versions
from einconv_kfac.optim.vectors import Direction

Outputs: TypeAlias = tuple[Tensor, ...]


class Replay:
    """Evaluates a model and its loss on recorded batches, and differentiates the model there.

    Parameters that are not given have their present values.

    Args:
        model: The model.
        paused: Returns a context in which hooks record nothing.
        compiled: Whether the recorded calls went through ``torch.compile``.

    Attributes:
        forward_mode: Whether Jacobian-vector products use forward mode; set to ``False`` where
            an operator of the model has none.
        is_checked: Whether the model was seen to repeat its output.
        takes_gradients: Whether the model itself takes gradients, as for forces; set to ``True``
            where a replay without a graph fails.
    """

    def __init__(
        self,
        model: nn.Module,
        paused: Callable[[], AbstractContextManager[None]] = nullcontext,
        *,
        compiled: bool = False,
    ) -> None:
        self.forward_mode = True
        self.takes_gradients = False
        self._doubts: list[Tensor] | None = None
        self.is_checked = False
        self._model = model
        self._paused = paused
        self._compiled = compiled

    def outputs(
        self, batch: Batch, given: Direction | None = None, *, subset: bool = False
    ) -> list[Tensor]:
        """Return the outputs that the loss depends on, ``[n, ...]`` each, and the parameters.

        Args:
            batch: The batch.
            given: The parameters that take other values than the present ones.
            subset: Whether to evaluate the examples that the curvature is computed from.
        """
        forwards, given = batch.curvature_forwards() if subset else batch.forwards, given or {}
        with self._paused():
            outputs = self._evaluated(forwards, given)
        others = {n: self._model.get_parameter(n) for n in batch.parameters if n not in given}
        return [*outputs, *((given | others)[name].detach() for name in batch.parameters)]

    def batch_loss(self, batch: Batch, given: Direction | None = None) -> Tensor:
        """Return the loss of a batch; see `outputs`."""
        assert batch.loss_model is not None
        outputs = self.outputs(batch, given)
        with self._paused():
            return batch.loss_model.value(outputs).detach()

    def slopes(self, batch: Batch) -> list[Tensor | None]:
        """Return the derivative of a batch's loss by each of its recorded outputs."""
        assert batch.loss_model is not None
        with self._paused():
            return list(batch.loss_model.slopes())[: len(batch.outputs)]

    def expansion(
        self, batch: Batch, directions: Sequence[Direction], tangents: Sequence[Tangents]
    ) -> Expansion:
        """Return slope and curvature of a batch's loss along directions, from its subset.

        The loss and its Hessian are those of the whole batch, whatever its reduction divides by.

        Args:
            batch: The batch.
            directions: The directions.
            tangents: Their `jacobian_products`.
        """
        assert batch.loss_model is not None
        own = [[d.get(name) for name in batch.parameters] for d in directions]
        if batch.subset is not None:
            tangents = [tuple(batch.subset.scattered(t) for t in each) for each in tangents]
        with self._paused():
            found = batch.loss_model.expansion([[*t, *p] for t, p in zip(tangents, own)])
        if batch.subset is None:
            return found
        return Expansion(found.slope, found.curvature * batch.subset.scale)

    def jacobian_products(
        self, batch: Batch, parameters: Direction, directions: Sequence[Direction]
    ) -> list[Tangents]:
        """Return ``J d`` for each direction ``d``, ``[k, ...]`` of the subset for each output.

        Args:
            batch: The batch.
            parameters: The present parameters by name.
            directions: The directions.

        Raises:
            RuntimeError: If the model can be differentiated neither in forward mode nor by two
                backward passes, or does not repeat its output.
        """
        with self._paused():
            if self.forward_mode:
                try:
                    return self._forward_products(batch, parameters, directions)
                except NotImplementedError:
                    self.forward_mode = False
            forwards = batch.curvature_forwards()

            def repeated(given: Direction) -> Outputs:
                outputs = run_all(forwards, self._model, given)
                check_repeated(batch, outputs)
                return outputs

            return backward_products(repeated, parameters, directions)

    def _forward_products(
        self, batch: Batch, parameters: Direction, directions: Sequence[Direction]
    ) -> list[Tangents]:
        """Return ``J d`` in forward mode."""
        forwards = batch.curvature_forwards()

        def run(given: Direction) -> Outputs:
            kept = not self.takes_gradients
            return run_all(forwards, self._model, given, tangents=kept)

        def products() -> tuple[Outputs, list[Tangents]]:
            return forward_products(
                run, parameters, directions, with_gradients=self.takes_gradients
            )

        try:
            outputs, found = products()
        except NotImplementedError:
            if self.takes_gradients:
                raise
        else:
            if self._is_repeated_(batch, outputs):
                return found
            if self.takes_gradients:
                check_repeated(batch, outputs)
        self.takes_gradients = True  # kept outputs or a missing graph may have broken it
        try:
            outputs, found = products()
            check_repeated(batch, outputs)
        except BaseException:
            self.takes_gradients = False
            raise
        return found

    def _is_repeated_(self, batch: Batch, outputs: Outputs) -> bool:
        """Return whether outputs are the recorded ones, or leave that open inside of `doubting`."""
        if self._doubts is None or self.takes_gradients:
            return is_repeated(batch, outputs)
        flags = repetitions(batch, outputs)
        self._doubts += flags or ()
        return flags is not None

    @contextmanager
    def doubting(self) -> Iterator[list[Tensor]]:
        """Return flags, all of which must be set for products made inside the block to be right.

        The host then reads them with other numbers. If one is not set, the products are made
        again outside of such a block.
        """
        doubts: list[Tensor] = []
        self._doubts = doubts
        try:
            yield doubts
        finally:
            self._doubts = None

    def check_recorded(self, batches: Sequence[Batch]) -> None:
        """Raise a ``RuntimeError`` if a batch cannot be replayed, without running the model."""
        for batch in batches:
            check_batch(self._model, batch, compiled=self._compiled)

    def check(
        self, batches: Sequence[Batch], parameters: Direction, direction: Direction
    ) -> list[Batch]:
        """Return batches that passed `check_recorded` as they are at the present point.

        Where parameters were changed after a forward pass, its outputs and loss are evaluated
        again, and those that depend on the same calls are joined. That the model repeats its
        output is checked once, and in every product. Inside of `doubting` that is left open.

        Args:
            batches: The batches, at least one.
            parameters: The present parameters by name.
            direction: Any direction.

        Raises:
            RuntimeError: If one of them cannot be replayed.
        """
        batches = [self._moved(self._restored(batch)) for batch in batches]
        if not self.is_checked:
            self.check_products_(batches[0], parameters, direction)
        return joined(batches)

    def check_products_(self, batch: Batch, parameters: Direction, direction: Direction) -> None:
        """Check that a batch can be differentiated, and choose how.

        Forward mode also differentiates what the model computes without gradients. Where that makes
        a difference to the backward pass, two of these take its place.

        For the other arguments and errors see `check`.
        """
        forwards = batch.curvature_forwards()

        def repeated(given: Direction) -> Outputs:
            outputs = run_all(forwards, self._model, given)
            if not self._is_repeated_(batch, outputs):
                check_repeated(batch, outputs)
            return outputs

        with self._paused(), torch.enable_grad(), GradientSwitch() as switch:
            repeated({})
        (tangents,) = self.jacobian_products(batch, parameters, [direction])
        if switch.was_off and self.forward_mode:
            with self._paused():
                adjoint = Adjoint.of(repeated, parameters, direction)
            environments = [each.call.environment for each in batch.forwards for _ in each.inputs]
            eps = [own.precision(t.dtype) for own, t in zip(environments, tangents)]
            self.forward_mode = adjoint.agrees(tangents, max(eps, default=0.0))
            self.jacobian_products(batch, parameters, [direction])
        self.is_checked = True

    def check_outputs(self, batches: Sequence[Batch]) -> None:
        """Raise a ``RuntimeError`` if the model, run as a whole, does not repeat its outputs."""
        for batch in batches:
            check_repeated(replace(batch, subset=None), self.outputs(batch)[: len(batch.outputs)])

    def _restored(self, batch: Batch) -> Batch:
        """Return a batch with the outputs of the model, if a script changed them in place since.

        Raises:
            RuntimeError: If parameters were changed as well.
        """
        if (written := batch.written.changed()) is None:
            return batch
        if any(each.call.has_moved(self._model) for each in batch.forwards):
            raise RuntimeError(
                "Outputs of the model must not be changed in place when parameters change before "
                f"the step and adaptive=True, got {written}. Write `out = out / t` in place of "
                "`out /= t`, or `out = out.masked_fill(mask, 0)` in place of `out[mask] = 0`."
            )
        assert batch.loss_model is not None
        outputs = tuple(self.outputs(batch)[: len(batch.outputs)])
        loss_model = batch.loss_model.at(outputs)
        return replace(batch, outputs=outputs, loss_model=loss_model, written=Versions(()))

    def _moved(self, batch: Batch) -> Batch:
        """Return a batch whose outputs are those of the present parameters."""
        if not any(each.call.has_moved(self._model) for each in batch.forwards):
            return batch
        outputs = tuple(self.outputs(batch)[: len(batch.outputs)])
        loss, model = self.batch_loss(batch), batch.loss_model
        assert model is not None
        if isinstance(model, GivenLoss):
            model = model.at(outputs)
        return replace(batch, outputs=outputs, loss=loss, loss_model=model, has_moved=True)

    def _evaluated(self, forwards: Sequence[ForwardPass], given: Direction) -> Outputs:
        """Return the tensors of forward passes; for ``given`` see `outputs`."""
        if not self.takes_gradients:
            try:
                with torch.no_grad():
                    return tuple(o.detach() for o in run_all(forwards, self._model, given))
            except RuntimeError as error:
                if "grad" not in str(error):
                    raise
        with torch.enable_grad():
            return tuple(o.detach() for o in run_all(forwards, self._model, given))

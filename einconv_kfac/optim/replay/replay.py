"""Replay of recorded batches: a model and its loss, evaluated and differentiated again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.objective.loss_model import Expansion
from einconv_kfac.optim.replay.adjoint import Adjoint, observed
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.checks import (
    check_batch,
    check_repeated,
    is_repeated,
    repetitions,
)
from einconv_kfac.optim.replay.forward import ForwardPass
from einconv_kfac.optim.replay.gradient_hooks import (
    evaluated_without_hooks,
    without_gradient_hooks,
)
from einconv_kfac.optim.replay.host_pooling import HostPooling
from einconv_kfac.optim.replay.joint import joined
from einconv_kfac.optim.replay.jvp import Tangents, backward_products, forward_products
from einconv_kfac.optim.replay.present_outputs import present
from einconv_kfac.optim.replay.runs import run_all
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
        leaves_out_hooks: Whether hooks on gradients are left out of a replay without a graph; set
            to ``True`` where one fails.
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
        self.leaves_out_hooks = False
        self._doubts: list[Tensor] | None = None
        self._pools = False
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
            repeated = partial(self._repeated, batch, is_repeated)
            return backward_products(repeated, parameters, directions)

    def _repeated(
        self, batch: Batch, accepts: Callable[[Batch, Outputs], bool], given: Direction
    ) -> Outputs:
        """Return the outputs of a subset with a graph, and check that they are the recorded ones.

        Args:
            batch: The batch.
            accepts: Returns whether they are.
            given: See `outputs`.
        """
        run = partial(run_all, batch.curvature_forwards(), self._model, given)
        known = partial(accepts, batch), partial(check_repeated, batch)
        return evaluated_without_hooks(run, self._model, *known)

    @contextmanager
    def _without_graph(self) -> Iterator[None]:
        """Return a context for a replay without a graph."""
        leaves_out = self.leaves_out_hooks and not self.takes_gradients
        hooks = without_gradient_hooks(self._model) if leaves_out else nullcontext()
        with hooks, HostPooling() if self._pools else nullcontext():
            yield

    def _forward_products(
        self, batch: Batch, parameters: Direction, directions: Sequence[Direction]
    ) -> list[Tangents]:
        """Return ``J d`` in forward mode."""
        forwards = batch.curvature_forwards()

        def run(given: Direction) -> Outputs:
            kept = not self.takes_gradients
            with self._without_graph():
                return run_all(forwards, self._model, given, tangents=kept)

        products = partial(forward_products, run, parameters, directions)
        try:
            outputs, found = products(with_gradients=self.takes_gradients)
        except NotImplementedError:
            if self.takes_gradients:
                raise
            if not self.leaves_out_hooks:
                return self._without_hooks_(batch, parameters, directions)
        else:
            if self._is_repeated_(batch, outputs):
                return found
            if self.takes_gradients:
                check_repeated(batch, outputs)
        self.takes_gradients = True  # kept outputs or a missing graph may have broken it
        try:
            outputs, found = products(with_gradients=True)
            check_repeated(batch, outputs)
        except BaseException:
            self.takes_gradients = False
            raise
        return found

    def _without_hooks_(
        self, batch: Batch, parameters: Direction, directions: Sequence[Direction]
    ) -> list[Tangents]:
        """Return ``J d`` in forward mode without hooks on gradients, from now on if that works."""
        self.leaves_out_hooks = True
        try:
            return self._forward_products(batch, parameters, directions)
        except BaseException:
            self.leaves_out_hooks = False
            raise

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
        batches = [present(batch, self._model, self) for batch in batches]
        if not self.is_checked:
            self.check_products_(batches[0], parameters, direction)
        return joined(batches)

    def check_products_(self, batch: Batch, parameters: Direction, direction: Direction) -> None:
        """Check that a batch can be differentiated, and choose how.

        In forward mode nothing requires gradients, none are switched off, and operators of
        ``torch.library`` drop tangents. Where that differs, two backward passes follow.
        """
        repeated = partial(self._repeated, batch, self._is_repeated_)
        leaves = {name: parameters[name].detach().requires_grad_() for name in direction}
        names: dict[Tensor, str] = {self._model.get_parameter(n): n for n in direction}
        with self._paused():
            is_doubtful, self._pools = observed(partial(repeated, leaves), names)
        (tangents,) = self.jacobian_products(batch, parameters, [direction])
        if is_doubtful:
            with self._paused():
                adjoint = Adjoint.of(repeated, self._model, parameters, direction)
            if self.forward_mode and not adjoint.agrees(tangents, batch.precision(tangents)):
                self.forward_mode = False
                (tangents,) = self.jacobian_products(batch, parameters, [direction])
            adjoint.check(tangents, batch.precision(tangents))
        self.is_checked = True

    def check_outputs(self, batches: Sequence[Batch]) -> None:
        """Raise a ``RuntimeError`` if the model, run as a whole, does not repeat its outputs."""
        for batch in batches:
            check_repeated(replace(batch, subset=None), self.outputs(batch)[: len(batch.outputs)])

    def _evaluated(self, forwards: Sequence[ForwardPass], given: Direction) -> Outputs:
        """Return the tensors of forward passes; for ``given`` see `outputs`."""
        if not self.takes_gradients:
            try:
                with torch.no_grad(), self._without_graph():
                    return tuple(o.detach() for o in run_all(forwards, self._model, given))
            except RuntimeError as error:
                if "grad" not in str(error):
                    raise
        with torch.enable_grad():
            return tuple(o.detach() for o in run_all(forwards, self._model, given))

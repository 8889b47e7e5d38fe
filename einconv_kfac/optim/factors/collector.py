"""Collects second moments for the factors in the backward passes of one step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Generator, Tensor, nn

from einconv_kfac.curvature.arguments import fraction
from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture
from einconv_kfac.curvature.estimation.evaluation import Evaluation
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.estimation.moments import Moments
from einconv_kfac.curvature.estimation.other_uses import used_past_calls
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.random_streams import stream
from einconv_kfac.distributed.shards import WHOLE, WholeModel
from einconv_kfac.distributed.workers import ALONE, NOBODY, Compared, Same, Workers
from einconv_kfac.distributed.wrappers import (
    compiled_wrappers,
    parallel_wrapper,
    recorded_module,
    unwrapped,
)
from einconv_kfac.optim.factors.accumulator import LayerSums
from einconv_kfac.optim.factors.batch_shares import Number
from einconv_kfac.optim.factors.compiled_parts import may_be_compiled, run_uncompiled_
from einconv_kfac.optim.factors.finiteness import Finiteness
from einconv_kfac.optim.factors.kept_layers import KeptLayers
from einconv_kfac.optim.factors.loss_weights import ROOT, LossWeights
from einconv_kfac.optim.factors.missing_calls import calls_error, is_trained
from einconv_kfac.optim.factors.sampled_moments import sampled
from einconv_kfac.optim.factors.seen_calls import SeenCalls
from einconv_kfac.optim.recording.passing import PassedOutputs
from einconv_kfac.optim.recording.recorder import Recorder
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.environment import without_autocast
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.vectors import Direction


class Collector:
    """Collects what the factors of layers need, in the backward passes of one step.

    A compiled model runs uncompiled while the collector is active.

    Args:
        model: The model, or what torch wrapped around it.
        estimator: Which Fisher of which loss.
        seed: Seed of sampled targets and examples.
        part: Fraction of the examples that the factors are averaged over.
        workers: The workers that collect together.
        stored: How the model is stored.
    """

    def __init__(
        self,
        model: nn.Module,
        estimator: FisherEstimator,
        seed: int,
        part: float = 1.0,
        workers: Workers = ALONE,
        stored: WholeModel = WHOLE,
    ) -> None:
        self._stored = stored
        self.workers, self._estimator, self.seed = workers, estimator, seed
        self._step, self._count, self._part = 0, 0, fraction("factor_fraction", part)
        self._model = unwrapped(model)
        self._layers: dict[str, Layer] = {}
        self.moments: dict[str, LayerSums] = {}
        self.bases: dict[str, EigenBlock] = {}  # in which squared gradients are summed
        self.due: set[str] = set()
        self.owners: Mapping[str, int] = NOBODY  # workers that alone need the sums of layers
        self.has_seen_loss, self._capture = False, LayerCapture([])  # since it was made
        self._past: dict[tuple[Any, ...], list[str]] = {}
        self.weights = LossWeights(estimator, workers)
        self._seen = SeenCalls(estimator.layouts)
        compiled, loss_fn = compiled_wrappers(model), estimator.loss_fn
        self._wrapper = wrapper = parallel_wrapper(model)
        self._is_compiled = bool(compiled)
        assert loss_fn is None or isinstance(loss_fn, nn.Module)
        self._is_early = wrapper is not None and workers.size > 1
        add, entry = self._add_early_ if self._is_early else self._add_, recorded_module(model)
        self.recorder = Recorder(self._model, loss_fn, add, self._forget_, self._capture, entry)
        self.replay = Replay(self._model, self.recorder.paused, compiled=bool(compiled))
        passed = [] if wrapper is None else [PassedOutputs(wrapper).remove]
        self._undo = [KeptLayers(self._model, self._capture).remove, self._capture.remove, *passed]
        self._undo += [run_uncompiled_(module, self._capture) for module in compiled]
        weakref.finalize(self, _undo_, self._undo)

    def watch(self, layer: Layer) -> None:
        """Collect for a layer, instead of one of the same name."""
        self._layers[layer.name] = layer
        self._capture.watch(layer)
        self.moments.pop(layer.name, None)
        self.workers.drop_()

    def begin_(self, due: Iterable[str], bases: dict[str, EigenBlock], step: int) -> None:
        """Drop what was collected, and collect for these layers from now on.

        Args:
            due: Names of the layers.
            bases: Eigenbases in which squared gradients are summed, by layer.
            step: The number of steps taken, on which random numbers depend.
        """
        self.moments, self.bases = {}, bases
        self._step, self._count = step, 0
        self.recorder.take()
        self.weights.begin_()
        self.due = set(due)
        self._capture.enabled = bool(self.due)
        if self._is_early:
            self.workers.expect_(self._complete, self.owners)

    def drop_due_(self) -> None:
        """Drop what was collected, and let the coming step do without."""
        self.moments, self.due = {}, set()
        self.workers.drop_()

    def combine_(self, batches: Sequence[Batch], scaler: Number = 1.0) -> None:
        """Add what the other workers collected, and find the weights of the losses.

        Args:
            batches: The batches of the step.
            scaler: See `LossWeights`.
        """
        if self.due:
            if self.weights.find_(batches, sorted(self.due), scaler):
                self.moments = {}
                self.workers.drop_()
            self.moments = self.workers.combined(self.moments, self._complete, self.owners)
            self.moments = {name: m for name, m in self.moments.items() if m.examples}

    def _complete(self) -> dict[str, LayerSums]:
        """Return what was collected for the layers that are due, also where that is nothing."""
        return {name: self.moments.get(name) or self._sums(name) for name in sorted(self.due)}

    def _sums(self, name: str) -> LayerSums:
        """Return the sums of no example of a layer."""
        approximation, size = self._estimator.approximation, self._estimator.max_factor_size
        own = self._layers[name], approximation, self.bases.get(name), size
        return LayerSums(*own, self.weights.shares())

    def _forget_(self) -> None:
        """Forget what was collected in this step."""
        self.moments, self._count = {}, 0
        self.weights.begin_()
        self.workers.drop_()

    def _add_early_(
        self, evaluation: Evaluation, calls: Sequence[LayerCall], batch: Batch
    ) -> frozenset[str]:
        """Add a batch and, if its gradients are averaged next, begin to add up what is due."""
        self.workers.drop_()
        added = self._add_(evaluation, calls, batch)
        if self.due and self._wrapper is not None and self._wrapper.require_backward_grad_sync:
            self.workers.begin_(self._complete)
        return added

    def _add_(
        self, evaluation: Evaluation, calls: Sequence[LayerCall], batch: Batch
    ) -> frozenset[str]:
        """Add a batch, from the graph of its outputs, unless its loss is not finite or weighs 0.

        The host reads that only with calls that were not seen before, of which more is found out
        from numbers: a step whose loss is not finite is skipped anyway.

        Returns:
            The layers to which the batch was added.
        """
        self.has_seen_loss = True
        with self._stored.apart(bool(self.due)):
            number, self._count = self.workers.number(self._count), self._count + 1
            own = [call for call in calls if call.layer in self.due]
            kind = tuple((call.layer, call.x.shape) for call in own)
            if not (self.due and evaluation.outputs and evaluation.examples):
                return frozenset()
            if (weighted := self.weights.next_(batch.weight, evaluation)) is None:
                return frozenset()
            if self.weights.begins_anew:
                self.moments = {}
            before = {name: sum(moments.counts()) for name, moments in self.moments.items()}
            generator = stream(evaluation.weight.device, "factors", self.seed, self._step, number)
            add = partial(self._add_own_, weighted, own, generator)
            try:
                with without_autocast(self._model):
                    self._seen.add_(kind, batch.loss, add, self._forget_)
            except BaseException:
                self._forget_()
                raise
            present = self.moments.items()
            return frozenset(n for n, m in present if sum(m.counts()) > before.get(n, 0))

    def _add_own_(
        self, evaluation: Evaluation, own: Sequence[LayerCall], generator: Generator
    ) -> None:
        """Add the calls of a batch that are due."""
        past = self._used_past_calls(evaluation, own)
        for name in {call.layer for call in own}.union(past):
            self.moments[name] = self.moments.get(name) or self._sums(name)
            self.moments[name].shares.begin_(self.weights.current)
        moments: Mapping[str, Moments] = self.moments
        if self._part < 1:
            moments = sampled(self.moments, self._part, generator)
        with self._capture.paused(repeats=True):  # checkpointed layers run again
            others = [call for call in own if call.layer not in past]
            if others:
                # a step whose loss is not finite is skipped
                batch = moments, others, evaluation, generator
                self._estimator.add_(*batch, may_be_empty=not evaluation.shows_emptiness)
            if past:
                layers = [self._layers[name] for name in past]
                self._estimator.add_weights_(moments, layers, evaluation, generator, together=True)
        self.moments = {name: m for name, m in self.moments.items() if m.examples}

    def _used_past_calls(self, evaluation: Evaluation, calls: Sequence[LayerCall]) -> list[str]:
        """Return the layers whose weights are used past their calls, or without calls.

        Args:
            evaluation: The batch.
            calls: The calls of all layers that are due.
        """
        counts, outputs = Counter((c.layer, c.has_parameters) for c in calls), evaluation.outputs
        kind, known = (len(outputs), *sorted(counts.items())), {name for name, _ in counts}
        if (uncalled := self.due - known) or kind not in self._past:
            hidden = self._is_compiled or may_be_compiled(self._model, uncalled, outputs)
            if uncalled and not hidden:
                known |= uncalled
            layers = [self._layers[name] for name in sorted(known)]
            layers = [own for own in layers if own.weight in own.tensors()]
            self._past[kind] = sorted(used_past_calls(outputs, calls, layers))
        return self._past[kind]

    def check(self, batches: Sequence[Batch]) -> None:
        """Raise a ``RuntimeError`` if layers that are due were trained but not seen.

        Args:
            batches: The batches of the step.
        """
        self.weights.check()
        weights = {name: self._layers[name].weight for name in self.due - self.moments.keys()}
        missing = [n for n, own in weights.items() if is_trained(self._model.get_parameter(own))]
        if missing:
            raise calls_error(self._model, missing, batches)

    def not_finite(
        self,
        gradient: Direction,
        losses: Sequence[Tensor],
        known: Sequence[Tensor],
        same: Compared = Same,
    ) -> str | None:
        """Return what is not finite: a loss, a gradient or collected moments; ``None`` if all is.

        The host waits. The first of those that are not finite is named.

        Args:
            gradient: The gradients.
            losses: The losses.
            known: The norms of the gradients.
            same: Returns what must be the same on all workers.
        """
        found = self.finiteness(gradient, losses, known)
        if self.workers.agree(found.flag, "are all numbers finite", same):
            return None
        flags, others = found.by_entry(), "A loss, gradient or Kronecker factor of another worker"
        if self.workers.agree(flags.all(), "is each number finite"):
            return None
        return found.fault(flags.tolist()) or others

    def finiteness(
        self, gradient: Direction, losses: Sequence[Tensor], known: Sequence[Tensor]
    ) -> Finiteness:
        """Return whether they are finite, for this worker and without waiting; see `not_finite`."""
        moments = {name: own.checked() for name, own in self.moments.items()}
        roots = self.weights.roots
        others = [*losses, *roots, *(part for own in moments.values() for part in own)]
        named = {
            "The loss": losses,
            ROOT: roots,
            **{f"The gradient of '{name}'": [own] for name, own in gradient.items()},
            **{f"A Kronecker factor of '{name}'": own for name, own in moments.items()},
        }
        return Finiteness(named, partial(list, known), others)

    def remove_hooks(self) -> None:
        """Detach from the model and the loss for good."""
        _undo_(self._undo)
        self.recorder.remove()


def _undo_(actions: list[Callable[[], None]]) -> None:
    """Call what undoes something, once."""
    while actions:
        actions.pop()()

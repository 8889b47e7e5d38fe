"""A loss that is read off its graph, between its computation and its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, outputs_of, sees_own_output
from einconv_kfac.curvature.estimation.evaluation import Evaluation, ReadEvaluation
from einconv_kfac.curvature.estimation.other_uses import nodes_inside
from einconv_kfac.curvature.objective.graph import Edge, dependents, edge_of, leaf_of
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.distributed.stored import leaf_names
from einconv_kfac.optim.recording.kept_calls import DROPPED
from einconv_kfac.optim.recording.observation import forward_passes
from einconv_kfac.optim.recording.observed_losses import ObservedLoss
from einconv_kfac.optim.recording.pending import PendingCalls
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.recording.returned_terms import terms_of
from einconv_kfac.optim.recording.viewed_outputs import OVERWRITTEN, is_overwritten_at
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.loss_input import LayerOutput, LossInput
from einconv_kfac.optim.replay.unknown_operations import (
    LINEAR,
    TRANSFORMS,
    refusal_of,
    refusal_of_derivatives,
)
from einconv_kfac.optim.replay.versions import Versions


class ReadObservation:
    """A loss whose dependence on the model is read off its autograd graph.

    Args:
        model: The model.
        pending: The calls of the model.
        loss: The loss, with its graph.
        is_assumed: See `Observation`.

    Attributes:
        parts: The losses that are parts of this one.
        is_waiting: Whether it was not backpropagated yet.
        is_assumed: See the argument.
    """

    is_waiting = True

    def __init__(
        self,
        model: nn.Module,
        pending: PendingCalls,
        loss: Tensor,
        *,
        is_assumed: bool = False,
    ) -> None:
        self._names = leaf_names(model)
        self._pending = pending
        self.is_assumed = is_assumed
        self._loss, self._tensor = loss.detach(), weakref.ref(loss)
        self._root: Edge | None = edge_of(loss)
        self._layer_calls = pending.layer_calls()
        self._has_calls = pending.has_calls
        terms = terms_of(self._root, pending, self._names)
        self._terms = {(call.number, source) for call, source in terms}
        found = [*self._found_calls(), *(call for call, _ in terms)]
        self._calls = {call.number: call for call in found}
        for call in self._calls.values():
            call.used |= not is_assumed
            call.readers.append(weakref.ref(self))

    def _found_calls(self) -> list[PendingCall]:
        """Return the calls of the model that the loss depends on."""
        found: list[PendingCall] = []
        assert self._root is not None
        self._uses_parameters = self._is_overwritten = self._lacks_calls = False
        whole = self._pending.losses.at(self._root)  # observed after it was recorded
        self.parts: list[ObservedLoss] = [] if whole is None else [whole]

        def stops(edge: Edge) -> bool:
            if (part := self._pending.losses.at(edge)) is not None:
                self.parts.append(part)
            owner = self._pending.source_at(edge)
            is_term = owner is not None and (owner[0].number, owner[1]) in self._terms
            if owner is None or is_term or edge == self._root:
                self._uses_parameters |= leaf_of(edge) in self._names
                self._is_overwritten |= is_overwritten_at(edge, id(self._pending))
                self._lacks_calls |= owner is None and self._pending.is_dropped_at(edge)
                return False
            found.append(owner[0])
            return True

        dependents(self._root, stops)
        return found

    @property
    def is_empty(self) -> bool:
        """Whether the loss depends neither on outputs of the model nor on its parameters."""
        return not self._calls and not self._uses_parameters

    @property
    def is_penalty(self) -> bool:
        """Whether the loss depends on parameters alone."""
        return not self._calls

    @property
    def root(self) -> Edge:
        """The edge of the loss."""
        tensor = self._tensor()
        if self._root is not None:
            return self._root
        assert tensor is not None
        return edge_of(tensor)

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """See `Observation`."""
        if self._is_overwritten:
            raise RuntimeError(OVERWRITTEN)
        if self._lacks_calls:
            raise RuntimeError(DROPPED)
        root = self.root
        for call in self._calls.values():
            call.used = True
        self.is_waiting = False
        self._root = None  # a hook of the graph that refers to the graph would keep it alive
        reading = self._reading(root, weight / _total(weight))
        while self._terms and not self._is_usable(reading):
            numbers = {each for each in self._terms if self._is_number(*each)}
            self._terms = numbers if numbers < self._terms else set()  # others count as outputs
            reading = self._reading(root, weight / _total(weight))
        return ReadEvaluation(reading), self._layer_calls

    def _is_usable(self, reading: Reading) -> bool:
        """Return whether a loss is to be read through its terms.

        Several numbers may be what a policy or a density is. Through these, all of the curvature
        is to be known, of tensors that are still those of the pass.
        """
        several = [each for each in self._terms if not self._is_number(*each)]
        if several and not (self._is_kept(reading, several) and reading.is_complete()):
            return False
        return not reading.tail(reading.graph.sources).unknown()

    def _is_kept(self, reading: Reading, several: Sequence[tuple[int, LossInput]]) -> bool:
        """Return whether the outputs of a reading are not changed, and have the same examples.

        Args:
            reading: What the graph says.
            several: The terms of several numbers, by call.
        """
        found = [self._source(edge) for edge in reading.graph.outputs]
        owners = [owner for owner in found if owner is not None]
        if not all(call.is_intact(source) and _is_seen(source) for call, source in owners):
            return False
        own = [call.values[source] for call, source in owners]
        own += [self._calls[call].values[source] for call, source in several]
        sizes = {value.shape[0] for value in own if value.ndim}
        return len(sizes) == 1 or not self._pending.separates_examples

    def _is_number(self, call: int, source: LossInput) -> bool:
        """Return whether a tensor of a call is one number."""
        return self._calls[call].values[source].numel() == 1

    def _reading(self, root: Edge, weight: Tensor) -> Reading:
        """Return what the graph of the loss says.

        Args:
            root: The edge of the loss.
            weight: The weight of each of its numbers in it.
        """
        at, calls = self._pending.losses.call_at, self._layer_calls if self._has_calls else []
        given = root, self._loss, weight, self._value, self._names, at, outputs_of(calls)
        return Reading(*given, self._pending.account)

    def _source(self, edge: Edge) -> tuple[PendingCall, LossInput] | None:
        """Return which tensor of which call an edge is, or ``None``."""
        owner = self._pending.source_at(edge, among=self._calls)
        is_term = owner is not None and (owner[0].number, owner[1]) in self._terms
        return None if is_term else owner

    def _value(self, edge: Edge) -> Tensor | None:
        """Return the value of a tensor of a call in the recorded pass."""
        owner = self._source(edge)
        return None if owner is None else owner[0].values[owner[1]]

    def batch(self, evaluation: Evaluation, weight: Tensor, *, replayed: bool) -> Batch:
        """See `Observation`."""
        assert isinstance(evaluation, ReadEvaluation)
        reading = evaluation.reading
        loss = (reading.weight * self._loss).sum()
        total = _total(weight) if weight.ndim else weight.abs()
        self._check_derivatives(reading, replayed=replayed)
        if not replayed:
            return Batch((), (), self._used(reading), None, loss, total)
        by_call: dict[int, list[tuple[LossInput, Edge]]] = {}
        for edge in reading.graph.outputs:
            owner = self._source(edge)
            assert owner is not None
            by_call.setdefault(owner[0].number, []).append((owner[1], edge))
        forwards = [(self._calls[number], inputs) for number, inputs in sorted(by_call.items())]
        outputs = [edge for _, inputs in forwards for _, edge in inputs]
        parameters = [edge for edge in reading.graph.sources if edge not in outputs]
        tail = reading.tail([*outputs, *parameters])
        return Batch(
            forward_passes([(call, [each for each, _ in inputs]) for call, inputs in forwards]),
            tuple(call.values[each] for call, inputs in forwards for each, _ in inputs),
            self._used(reading),
            tail,
            loss,
            total,
            Versions(("a tensor that the loss is computed from", t) for t in tail.tensors()),
            written=Versions.known(
                (f"a tensor of the model ({each})", call.values[each], call.versions[each])
                for call, inputs in forwards
                for each, _ in inputs
            ),
            is_assumed=self.is_assumed,
        )

    def _used(self, reading: Reading) -> tuple[str, ...]:
        """Return the names of the parameters that the loss uses itself, in the order of sources."""
        leaves = (leaf_of(edge) for edge in reading.graph.sources)
        return tuple(self._names[leaf] for leaf in leaves if leaf in self._names)

    def _check_derivatives(self, reading: Reading, *, replayed: bool) -> None:
        """Raise a ``RuntimeError`` if the loss uses layers in derivatives outside of the model.

        Args:
            reading: What the graph of the loss says.
            replayed: Whether the batch is to be replayed.
        """
        kinds = reading.graph.derivatives()
        if not kinds and len(reading.graph.sources) > len(reading.graph.outputs):
            if self._pending.has_transforms:
                kinds = [TRANSFORMS]
            elif self._enters_layers(reading):
                kinds = [LINEAR]
        if not kinds:
            return
        leaves = (leaf_of(edge) for edge in reading.graph.sources)
        names = [f"{self._names[leaf]}." for leaf in leaves if leaf is not None]
        layers = {call.layer for call in self._layer_calls}
        used = [
            each
            for each in sorted(layers)
            if any(name.startswith(f"{each}." if each else "") for name in names)
        ]
        if used:
            is_named = replayed and kinds[0] not in (LINEAR, TRANSFORMS)
            text = refusal_of(kinds) if is_named else refusal_of_derivatives(kinds, used)
            raise RuntimeError(text)

    def _enters_layers(self, reading: Reading) -> bool:
        """Return whether the loss uses operations inside of a layer's call past its output.

        The derivative of a linear layer is linear, of the weight as the call transposed it.
        """
        ends = {call.output.node for call in self._layer_calls}
        inner = {node for call in self._layer_calls for node in nodes_inside(call)} - ends
        return any(leaf_of((node, 0)) is None for node in reading.graph.past(ends) & inner)


def _is_seen(source: LossInput) -> bool:
    """Return whether a replay sees a tensor as the pass did, not changed by hooks of others."""
    return not isinstance(source, LayerOutput) or sees_own_output(source.module)


def _total(weight: Tensor) -> Tensor:
    """Return the weight of a loss in the objective, which several numbers share."""
    total = weight.sum()
    if weight.ndim == 0:
        total = total.abs()  # a loss that is maximised has the weight -1 in itself
    return total.where(total > 0, 1)

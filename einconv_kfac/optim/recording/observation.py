"""A loss between its computation and its backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.evaluation import Evaluation, ReadEvaluation, RuleEvaluation
from einconv_kfac.curvature.estimation.other_uses import nodes_inside
from einconv_kfac.curvature.losses import has_rule
from einconv_kfac.curvature.losses.loss_call import Targets, depends_on_parameters
from einconv_kfac.curvature.losses.loss_registry import is_overridden
from einconv_kfac.curvature.losses.snapshot import snapshot
from einconv_kfac.curvature.objective.graph import Edge, dependents, edge_of, leaf_of
from einconv_kfac.curvature.objective.loss_model import GivenLoss
from einconv_kfac.curvature.objective.reading import Reading
from einconv_kfac.distributed.stored import graph_leaf
from einconv_kfac.optim.recording.pending import DROPPED, ObservedLoss, PendingCalls, forward_passes
from einconv_kfac.optim.recording.pending_call import PendingCall
from einconv_kfac.optim.recording.viewed_outputs import OVERWRITTEN, is_overwritten_at
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.environment import Autocast
from einconv_kfac.optim.replay.loss_input import Inside, LossInput, Returned
from einconv_kfac.optim.replay.unknown_operations import LINEAR, refusal_of_derivatives
from einconv_kfac.optim.replay.versions import Versions


class Observation(Protocol):
    """A loss that may be backpropagated later."""

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """Return the loss and the calls of layers, while its graph exists.

        Args:
            weight: The derivative of the objective with respect to the loss, shaped like it.
        """

    def batch(self, evaluation: Evaluation, weight: Tensor, *, replayed: bool) -> Batch:
        """Return the batch, after `evaluation`.

        Args:
            evaluation: What `evaluation` returned.
            weight: See `evaluation`.
            replayed: Whether the batch is to be replayed.
        """


class GivenObservation:
    """A loss module that was called on an output of the model.

    Args:
        loss_fn: The loss as it was at the call.
        arguments: Its arguments.
        loss: The loss, detached.
        owner: The call of the model, and which of its tensors the first argument is.
        layer_calls: The calls of layers up to the loss.
    """

    def __init__(
        self,
        loss_fn: nn.Module,
        arguments: Sequence[Any],
        loss: Tensor,
        owner: tuple[PendingCall, LossInput],
        layer_calls: list[LayerCall],
    ) -> None:
        self._loss_fn, self._loss, self._layer_calls = loss_fn, loss, layer_calls
        self._output, *self._targets = arguments
        self._owner, self._autocast = owner, Autocast.now(self._output.device.type)
        self._written = Versions([("the output", self._output.detach())])
        self._versions = Versions(("a target of the loss", target) for target in self._targets)

    @staticmethod
    def of(
        loss_fn: nn.Module,
        arguments: Sequence[Any],
        loss: Tensor,
        pending: PendingCalls,
        inside: Inside | None,
    ) -> GivenObservation | None:
        """Return the observation, or ``None`` if a rule for the loss or the output is missing."""
        owner = pending.owner_of(arguments[0], inside)
        is_known = has_rule(loss_fn) and not is_overridden(loss_fn)
        is_known = is_known and not depends_on_parameters(tuple(arguments[1:]))
        if owner is None or owner[0].call is None or not is_known:
            return None
        if isinstance(owner[1], Returned) and not owner[0].is_intact(owner[1]):
            return None
        owner[0].used = True
        pending.account.add_rule_(loss_fn)
        own = snapshot(loss_fn)
        return GivenObservation(own, arguments, loss.detach(), owner, pending.layer_calls())

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """See `Observation`."""
        targets = self._targets
        target = targets[0] if len(targets) == 1 else Targets(targets)
        own = self._loss_fn, self._output, target
        return RuleEvaluation(*own, settings=self._autocast.restored), self._layer_calls

    def batch(self, evaluation: Evaluation, weight: Tensor, *, replayed: bool) -> Batch:
        """See `Observation`."""
        output = self._output.detach()
        return Batch(
            forward_passes([(self._owner[0], [self._owner[1]])]),
            (output,),
            (),
            GivenLoss.recorded(self._loss_fn, output, self._targets, self._loss)
            if replayed
            else None,
            self._loss,
            weight,
            self._versions,
            written=self._written,
        )


class ReadObservation:
    """A loss whose dependence on the model is read off its autograd graph.

    Args:
        model: The model.
        pending: The calls of the model.
        loss: The loss, with its graph.

    Attributes:
        parts: The losses that are parts of this one.
        is_waiting: Whether it was not backpropagated yet.
    """

    is_waiting = True

    def __init__(self, model: nn.Module, pending: PendingCalls, loss: Tensor) -> None:
        self._names: dict[Tensor, str] = {
            graph_leaf(p): name for name, p in model.named_parameters()
        }
        self._pending = pending
        self._loss, self._tensor = loss.detach(), weakref.ref(loss)
        self._root: Edge | None = edge_of(loss)
        self._layer_calls = pending.layer_calls()
        self._has_calls = pending.has_calls
        self._calls = {call.number: call for call in self._found_calls()}
        for call in self._calls.values():
            call.used = True
            call.readers.append(weakref.ref(self))

    def _found_calls(self) -> list[PendingCall]:
        """Return the calls of the model that the loss depends on."""
        found: list[PendingCall] = []
        assert self._root is not None
        self._uses_parameters = self._is_overwritten = self._lacks_calls = False
        whole = self._pending.loss_at(self._root)  # observed after it was recorded
        self.parts: list[ObservedLoss] = [] if whole is None else [whole]

        def stops(edge: Edge) -> bool:
            if (part := self._pending.loss_at(edge)) is not None:
                self.parts.append(part)
            owner = self._pending.source_at(edge)
            if owner is None or edge == self._root:
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

    def evaluation(self, weight: Tensor) -> tuple[Evaluation, list[LayerCall]]:
        """See `Observation`."""
        if self._is_overwritten:
            raise RuntimeError(OVERWRITTEN)
        if self._lacks_calls:
            raise RuntimeError(DROPPED)
        root, tensor = self._root, self._tensor()
        if root is None:
            assert tensor is not None
            root = edge_of(tensor)
        self.is_waiting = False
        self._root = None  # a hook of the graph that refers to the graph would keep it alive
        own = weight / _total(weight)
        at = self._pending.call_at
        calls = self._layer_calls if self._has_calls else []
        layers = [(call.output.node, call.output.output_nr) for call in calls]
        given = root, self._loss, own, self._value, self._names, at, layers
        return ReadEvaluation(Reading(*given, self._pending.account)), self._layer_calls

    def _source(self, edge: Edge) -> tuple[PendingCall, LossInput] | None:
        """Return which tensor of which call an edge is, or ``None``."""
        return self._pending.source_at(edge, among=self._calls)

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
        if not replayed:
            self._check_derivatives(reading)
            return Batch((), (), (), None, loss, total)
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
            tuple(self._names[leaf] for e in parameters if (leaf := leaf_of(e)) is not None),
            tail,
            loss,
            total,
            Versions(("a tensor that the loss is computed from", t) for t in tail.tensors()),
            written=Versions.known(
                (f"a tensor of the model ({each})", call.values[each], call.versions[each])
                for call, inputs in forwards
                for each, _ in inputs
            ),
        )

    def _check_derivatives(self, reading: Reading) -> None:
        """Raise a ``RuntimeError`` if the loss uses layers in derivatives outside of the model."""
        kinds = reading.graph.derivatives()
        if not kinds and len(reading.graph.sources) > len(reading.graph.outputs):
            kinds = [LINEAR] if self._enters_layers(reading) else []
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
            raise RuntimeError(refusal_of_derivatives(kinds, used))

    def _enters_layers(self, reading: Reading) -> bool:
        """Return whether the loss uses operations inside of a layer's call past its output.

        The derivative of a linear layer is linear, of the weight as the call transposed it.
        """
        ends = {call.output.node for call in self._layer_calls}
        inner = {node for call in self._layer_calls for node in nodes_inside(call)} - ends
        return any(leaf_of((node, 0)) is None for node in reading.graph.past(ends) & inner)


def _total(weight: Tensor) -> Tensor:
    """Return the weight of a loss in the objective, which several numbers share."""
    total = weight.sum()
    if weight.ndim == 0:
        total = total.abs()  # a loss that is maximised has the weight -1 in itself
    return total.where(total > 0, 1)

"""Calls of a model since the last step, from whose outputs losses are computed."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture
from einconv_kfac.curvature.objective.graph import Edge, edge_of, has_marks, mark_, mark_of, within
from einconv_kfac.curvature.objective.loss_account import LossAccount
from einconv_kfac.curvature.objective.outputs import tensors_of
from einconv_kfac.optim.recording.input_derivatives import (
    Arguments,
    InputDerivatives,
    has_curved,
)
from einconv_kfac.optim.recording.kept_calls import KeptCalls
from einconv_kfac.optim.recording.loss_marks import LossMarks
from einconv_kfac.optim.recording.pending_call import Mark, PendingCall
from einconv_kfac.optim.recording.separate_outputs import separate
from einconv_kfac.optim.recording.viewed_outputs import mark_viewed_
from einconv_kfac.optim.replay.chain import (
    ChainedArgument,
    Source,
    chained_arguments,
    dependence_of,
    needed,
)
from einconv_kfac.optim.replay.forward import ModelCall
from einconv_kfac.optim.replay.loss_input import (
    OUTER,
    CarriedBuffer,
    Derivative,
    Inside,
    LayerOutput,
    LossInput,
    Returned,
    Vector,
)


class PendingCalls:
    """The calls of a model since the last step.

    A call is dropped once its losses were backpropagated and its output is gone. Of calls whose
    output is gone before, the last ones are kept (see `KeptCalls`), and those whose
    graph is seen to exist, so that memory stays bounded where no output is backpropagated.

    Args:
        capture: Records the calls of layers.
        names: Returns the parameters of the model with their names.
        is_compiled: Whether compiled code calls the layers, which hooks may not see.

    Attributes:
        is_compiled: See the argument.
        account: Keeps what the losses were taken as.
        losses: The marks of losses.
        has_transforms: Whether the model was called inside of transforms of ``torch.func``, where
            calls are not recorded.
        separates_examples: Whether something is computed for examples alone.
    """

    def __init__(
        self,
        capture: LayerCapture,
        names: Callable[[], dict[Tensor, str]],
        *,
        is_compiled: bool = False,
    ) -> None:
        self.account, self.losses = LossAccount(), LossMarks()
        self._capture, self._names, self.is_compiled = capture, names, is_compiled
        self._pending = KeptCalls()
        self.has_transforms = self.separates_examples = False
        self._numbers = itertools.count()
        self._first = 0

    @property
    def is_empty(self) -> bool:
        """Whether no call of the model or of a layer is kept."""
        return not self._pending and not self._capture.calls

    def begin_(self, call: ModelCall) -> None:
        """Begin a call of the model."""
        self._assign_()
        numbers = {number for number, _ in needed(each.own for each in call.chained)}
        earlier = self._pending.having(numbers)
        self._pending.drop_()
        for each in earlier.values():
            each.used = True
        new = PendingCall(next(self._numbers), call, earlier=earlier)
        self._pending[new.number] = new

    def chained(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], buffers: Mapping[str, Tensor]
    ) -> tuple[ChainedArgument, ...]:
        """Return the arguments and buffers of a call that depend on earlier calls of the model.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            buffers: The buffers that require gradients, by name.
        """
        own = {name: each for name, each in buffers.items() if not self._is_past(edge_of(each))}
        return chained_arguments(args, kwargs, own, self._tensor_at, self._names, self._is_past)

    def _is_past(self, edge: Edge) -> bool:
        """Return whether an edge is a tensor of a call before the last step."""
        mark = mark_of(edge, (id(self), True)) or mark_of(within(edge), (id(self), True))
        return mark is not None and mark.call < self._first

    def _tensor_at(self, edge: Edge) -> tuple[Source, Tensor] | None:
        """Return which tensor of which call an edge of the graph is, and its value."""
        own = self.source_at(edge, inner=False)
        return None if own is None else ((own[0].number, own[1]), own[0].values[own[1]])

    def depends_(self, call: PendingCall, vector: Vector, tensor: Tensor) -> bool:
        """See `Notes`; the graph is read if the call is to be replayed."""
        if not call.is_replayed:
            return True
        try:
            found = dependence_of(tensor, self._tensor_at, self._names())
        except RuntimeError:  # as of code that was compiled
            return False
        if found is not None:
            numbers = {number for number, _ in needed([found])} - {call.number}
            call.vectors[vector] = found
            call.others |= {own: weakref.ref(p) for own, p in self._pending.having(numbers).items()}
        return True

    def in_transform_(self) -> None:
        """Note that a transform of ``torch.func`` calls the model, if a call of it does not."""
        self.has_transforms |= self._pending.running is None

    def inside_(self, loss_fn: nn.Module) -> Inside | None:
        """Count a loss that is being computed; return its input if that is inside the model."""
        running = self._pending.running
        if running is None:
            return None
        running.losses += 1
        return Inside(loss_fn, running.losses - 1)

    def mark_layer_(self, module: nn.Module, output: Any) -> None:
        """Mark the output of a layer inside the call that is running, if it is one tensor."""
        pending, is_tensor = self._pending.running, isinstance(output, Tensor)
        if pending is not None and is_tensor and output.requires_grad:
            self._mark_(pending, LayerOutput(module, pending.marked[module]), output)
            pending.marked[module] += 1

    def end_(self, output: Any, states: Sequence[tuple[CarriedBuffer, Tensor]] = ()) -> Any:
        """End the call of the model that is running, and return what the script gets.

        Args:
            output: The output.
            states: The buffers that depend on the call.
        """
        self._assign_()
        pending = self._pending.latest
        if pending is None:
            return output
        watch, given = pending.derivatives, output
        tensors, shared = list(tensors_of(output)), set[int]()
        if watch is not None:
            watch.end_call_()
            given, shared = separate(output, tensors, watch.first)
        pairs = list(zip(tensors, tensors_of(given)))
        pending.call = None if pending.call is None else pending.call.ended()
        pending.outputs = [weakref.ref(own) for _, own in pairs]
        for index, (tensor, own) in enumerate(pairs):
            if tensor.requires_grad:
                self._mark_(pending, Returned(index), tensor, own)
                if watch is not None:
                    watch.watch_(Returned(index), own, is_shared=id(tensor) in shared)
        for source, tensor in states:
            if mark_of(edge_of(tensor), (id(self), True)) is None:
                self._mark_(pending, source, tensor)
        return given

    def watched_(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Arguments | None:
        """Return arguments by which derivatives of the call that is running are seen, if any."""
        if not has_curved((*args, *kwargs.values())):
            return None
        pending = self._pending.latest
        assert pending is not None
        pending.derivatives = InputDerivatives(self, pending)
        return pending.derivatives.watched(args, kwargs)

    def found_(self, call: PendingCall, source: Derivative, tensor: Tensor) -> None:
        """See `Notes`."""
        self._mark_(call, source, tensor)

    def _mark_(
        self, pending: PendingCall, source: LossInput, tensor: Tensor, own: Tensor | None = None
    ) -> None:
        """Mark a tensor of a call, and keep its value; the script may have a copy of its own."""
        value = tensor if own is None else own
        pending.values[source], pending.versions[source] = value.detach(), value._version
        mark, is_returned = Mark(pending.number, source), isinstance(source, OUTER)
        mark_(tensor, (id(self), is_returned), mark)
        if is_returned and edge_of(tensor)[0] not in {c.output.node for c in pending.layer_calls}:
            pending.marks.append(weakref.ref(mark))  # others belong to nodes that calls keep
        if isinstance(source, Returned):
            mark_viewed_(tensor, id(self))

    def source_at(
        self,
        edge: Edge,
        *,
        inner: bool = True,
        among: Mapping[int, PendingCall] | None = None,
    ) -> tuple[PendingCall, LossInput] | None:
        """Return which tensor of which call an edge of the graph is, or ``None``.

        Args:
            edge: The edge.
            inner: Whether outputs of layers count, past what the model returns.
            among: The calls by number; those that are pending by default.
        """
        if not has_marks(edge):
            return None
        mark = mark_of(edge, (id(self), True)) or mark_of(within(edge), (id(self), True))
        if mark is None and inner:
            mark = mark_of(edge, (id(self), False))
        calls = self._pending if among is None else among
        known = mark is not None and mark.call in calls
        return (calls[mark.call], mark.source) if known else None

    def marked(self) -> set[nn.Module]:
        """Return the layers whose outputs are marked."""
        return {module for pending in self._pending.values() for module in pending.marked}

    def is_layer_at(self, edge: Edge) -> bool:
        """Return whether an edge is the output of a layer."""
        return mark_of(edge, (id(self), False)) is not None

    def owner_of(
        self, argument: Tensor, inside: Inside | None
    ) -> tuple[PendingCall, LossInput] | None:
        """Return the call that gave a loss its argument, and how.

        Args:
            argument: The argument.
            inside: How the model gave it to the loss, if the model calls the loss.
        """
        self._assign_()
        if inside is not None:
            latest = self._pending.latest
            assert latest is not None
            return latest, inside
        calls = reversed(self._pending.values())
        inputs = ((pending, pending.input_of(argument)) for pending in calls)
        found = next(((p, source) for p, source in inputs if source is not None), None)
        return self._passed_on(argument) if found is None else found

    def _passed_on(self, argument: Tensor) -> tuple[PendingCall, LossInput] | None:
        """Return the call whose output a wrapper passed on as a tensor, and which it is."""
        if not argument.requires_grad or within(edge_of(argument)) == edge_of(argument):
            return None
        return self.source_at(edge_of(argument), inner=False)

    def is_dropped_at(self, edge: Edge) -> bool:
        """Return whether an edge is a tensor of a call since the last step that was dropped."""
        if not has_marks(edge):
            return False
        mark = mark_of(edge, (id(self), True)) or mark_of(edge, (id(self), False))
        return mark is not None and mark.call >= self._first and mark.call not in self._pending

    @property
    def has_calls(self) -> bool:
        """Whether the model or a part of it was called, beside layers of another module."""
        return any(pending.call is not None for pending in self._pending.values())

    def layer_calls(self) -> list[LayerCall]:
        """Return all calls of layers so far."""
        self._assign_()
        return [call for pending in self._pending.values() for call in pending.layer_calls]

    def clear_(self) -> None:
        """Drop all of them."""
        self._capture.take()
        self.losses.returned.is_needed, self.losses.returned.marks = True, []
        self.has_transforms = False
        self._pending.clear()
        self._first = next(self._numbers)

    def _assign_(self) -> None:
        """Assign the calls of layers since the last time to the latest call of the model."""
        layer_calls = self._capture.take()
        if not layer_calls:
            return
        latest = self._pending.latest
        if latest is None:
            latest = PendingCall(next(self._numbers))
            self._pending[latest.number] = latest
        latest.layer_calls += layer_calls

"""A call of a model since the last step, and the marks of its tensors."""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.optim.recording.input_derivatives import InputDerivatives
from einconv_kfac.optim.replay.chain import Dependence
from einconv_kfac.optim.replay.environment import NOT_KEPT
from einconv_kfac.optim.replay.forward import ModelCall
from einconv_kfac.optim.replay.loss_input import LossInput, Returned, Vector


@dataclass(frozen=True, eq=False)
class Mark:
    """Identifies a tensor of a call, by the call's number, at its edge, whose graph owns it."""

    call: int
    source: LossInput


class Reader(Protocol):
    """A loss that is read off its graph."""

    is_waiting: bool
    """Whether it was not backpropagated yet."""


@dataclass(eq=False)
class PendingCall:
    """A call of the model, or calls of layers outside of one.

    Args:
        number: Its number.
        call: The call of the model; ``None`` outside of one.
        layer_calls: The calls of layers.
        values: The tensors that it returned or computed inside, detached.
        versions: The versions of these tensors when they were computed.
        marked: The number of outputs of each layer among them.
        marks: Weak references to the marks of outputs that the graph alone keeps.
        outputs: Weak references to the tensors of the output; ``None`` while the call runs.
        losses: Number of losses that the model has computed so far.
        used: Whether a loss was computed from the output.
        readers: Weak references to losses that are read off the graph, with the output or without.
        earlier: The calls that its arguments depend on, by number.
        derivatives: Watches derivatives by its arguments, if one requires gradients.
        vectors: How vectors of these depend on tensors of calls and on parameters.
        others: Weak references to the calls that they depend on, by number.
    """

    number: int
    call: ModelCall | None = None
    layer_calls: list[LayerCall] = field(default_factory=list)
    values: dict[LossInput, Tensor] = field(default_factory=dict)
    versions: dict[LossInput, int] = field(default_factory=dict)
    marked: Counter[nn.Module] = field(default_factory=Counter)
    marks: list[weakref.ref[Mark]] = field(default_factory=list)
    outputs: list[weakref.ref[Tensor]] | None = None
    losses: int = 0
    used: bool = False
    readers: list[weakref.ref[Reader]] = field(default_factory=list)
    earlier: dict[int, PendingCall] = field(default_factory=dict)
    derivatives: InputDerivatives[PendingCall] | None = None
    vectors: dict[Vector, Dependence] = field(default_factory=dict)
    others: dict[int, weakref.ref[PendingCall]] = field(default_factory=dict)

    @property
    def is_running(self) -> bool:
        """Whether the call has begun and not ended."""
        return self.call is not None and self.outputs is None

    @property
    def is_replayed(self) -> bool:
        """Whether it is to be run again."""
        return self.call is not None and self.call.environment is not NOT_KEPT

    @property
    def is_alive(self) -> bool:
        """Whether a tensor of the output is seen to exist.

        What is known of vectors keeps graph and output alive, which then says nothing.
        """
        return not self.vectors and any(own() is not None for own in self.outputs or [])

    @property
    def may_have_loss(self) -> bool:
        """Whether a loss may still be computed from the output, or from losses that wait."""
        readers = (reference() for reference in self.readers)
        return not self.used or any(each is not None and each.is_waiting for each in readers)

    @property
    def entries(self) -> int:
        """Number of entries of the inputs of layers."""
        return sum(call.x.numel() for call in self.layer_calls)

    @property
    def has_graph(self) -> bool:
        """Whether the graph of an output is seen to exist, for a loss that may come later."""
        return not self.vectors and any(reference() is not None for reference in self.marks)

    def is_intact(self, source: LossInput) -> bool:
        """Return whether no operation has changed a tensor in place."""
        return self.values[source]._version == self.versions[source]

    def input_of(self, argument: Tensor) -> LossInput | None:
        """Return which tensor of the output an argument is, or ``None``."""
        for index, reference in enumerate(self.outputs or []):
            if reference() is argument:
                return Returned(index)
        return None

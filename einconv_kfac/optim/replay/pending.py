"""Forward passes whose losses have not been computed yet."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture
from einconv_kfac.optim.replay.forward import ForwardPass, ModelCall
from einconv_kfac.optim.replay.loss_input import Inside, LossInput, Returned, tensors_of

CALLS_WITHOUT_LOSS = 8
"""Number of calls of the model without a loss for which the calls of layers are kept."""


@dataclass(eq=False)
class _Pending:
    """A call of the model, or calls of layers outside of one.

    Args:
        call: The call of the model; ``None`` outside of one, and once the output is gone.
        layer_calls: The calls of layers.
        outputs: Weak references to the tensors of the output; ``None`` while the call runs.
        losses: Number of losses that the model has computed so far.
        used: Whether a loss was computed from the output.
    """

    call: ModelCall | None = None
    layer_calls: list[LayerCall] = field(default_factory=list)
    outputs: list[weakref.ref[Tensor]] | None = None
    losses: int = 0
    used: bool = False

    @property
    def is_running(self) -> bool:
        """Whether the call has begun and not ended."""
        return self.call is not None and self.outputs is None

    @property
    def is_alive(self) -> bool:
        """Whether a tensor of the output exists."""
        return any(reference() is not None for reference in self.outputs or [])

    def input_of(self, argument: Tensor) -> LossInput | None:
        """Return how a loss takes its argument from the output, or ``None`` if it does not."""
        for index, reference in enumerate(self.outputs or []):
            if reference() is argument:
                return Returned(index)
        return None


class PendingCalls:
    """The calls of a model since the last step.

    A call is dropped once a loss was computed from it and its output is gone. Of calls whose
    output is gone without a loss, the last `CALLS_WITHOUT_LOSS` are kept, so that memory stays
    bounded where outputs are never backpropagated.

    Args:
        capture: Records the calls of layers.
    """

    def __init__(self, capture: LayerCapture) -> None:
        self._capture = capture
        self._pending: list[_Pending] = []

    @property
    def is_empty(self) -> bool:
        """Whether no call of the model or of a layer is kept."""
        return not self._pending and not self._capture.calls

    def begin_(self, call: ModelCall) -> None:
        """Begin a call of the model."""
        self._assign_()
        gone = [pending for pending in self._pending if not pending.is_alive]
        for pending in gone:
            pending.call = None
        unused = [pending for pending in gone if not pending.used][-CALLS_WITHOUT_LOSS:]
        kept = [p for p in self._pending if p not in gone or p in unused]
        self._pending = [*kept, _Pending(call)]

    def count_loss_(self, loss_fn: nn.Module) -> Inside | None:
        """Count a loss that is being computed; return its input if that is inside the model."""
        if not self._pending or not self._pending[-1].is_running:
            return None
        self._pending[-1].losses += 1
        return Inside(loss_fn, self._pending[-1].losses - 1)

    def end_(self, output: Any) -> None:
        """End the call of the model that is running."""
        self._assign_()
        if self._pending:
            self._pending[-1].outputs = [weakref.ref(tensor) for tensor in tensors_of(output)]

    def use_(
        self, argument: Tensor, inside: Inside | None
    ) -> tuple[ForwardPass | None, list[LayerCall]]:
        """Return the forward pass that gave a loss its argument, and all calls of layers so far.

        Args:
            argument: The argument.
            inside: How the model gave it to the loss, if the model calls the loss.
        """
        self._assign_()
        inputs = [(pending, pending.input_of(argument)) for pending in self._pending]
        found = [(pending, loss_input) for pending, loss_input in inputs if loss_input is not None]
        if inside is not None:
            found = [(self._pending[-1], inside)]
        for pending in [pending for pending, _ in found] or self._pending:
            pending.used = True
        layer_calls = [call for pending in self._pending for call in pending.layer_calls]
        if not found or (call := found[-1][0].call) is None:
            return None, layer_calls
        return ForwardPass(call, found[-1][1]), layer_calls

    def clear_(self) -> None:
        """Drop all of them."""
        self._capture.take()
        self._pending = []

    def _assign_(self) -> None:
        """Assign the calls of layers since the last time to the latest call of the model."""
        layer_calls = self._capture.take()
        if layer_calls and not self._pending:
            self._pending = [_Pending()]
        if layer_calls:
            self._pending[-1].layer_calls += layer_calls

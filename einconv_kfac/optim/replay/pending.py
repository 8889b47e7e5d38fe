"""Forward passes whose loss is still to come."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.estimation.capture import LayerCall, LayerCapture
from einconv_kfac.optim.replay.forward import ForwardPass, Surroundings
from einconv_kfac.optim.replay.layer_jvp import Kept, keep_output
from einconv_kfac.optim.replay.loss_input import Inside, Place, Returned, tensors_of

LIMIT = 8
"""Number of forward passes without a loss of which the layers' calls are kept."""


@dataclass(eq=False)
class _Pass:
    """A forward pass: how it began, what its layers were called with, and its outputs.

    Args:
        begun: Arguments, keyword arguments, surroundings and kept outputs, or ``None`` for calls
            of layers outside of a forward pass of the model.
        calls: The calls of layers.
        outputs: Each returns a tensor of the output while somebody keeps it; ``None`` while the
            pass is under way.
        losses: Number of losses computed inside of it so far.
        used: Whether a loss was computed from it.
    """

    begun: tuple[tuple[Any, ...], dict[str, Any], Surroundings, Kept] | None = None
    calls: list[LayerCall] = field(default_factory=list)
    outputs: list[weakref.ref[Tensor]] | None = None
    losses: int = 0
    used: bool = False

    @property
    def is_running(self) -> bool:
        """Tell whether it is under way."""
        return self.begun is not None and self.outputs is None

    @property
    def is_alive(self) -> bool:
        """Tell whether somebody keeps an output."""
        return any(reference() is not None for reference in self.outputs or [])

    def place_of(self, output: Tensor) -> Place | None:
        """Return where the output has a tensor, if it does."""
        for index, reference in enumerate(self.outputs or []):
            if reference() is output:
                return Returned(index)
        return None


class PendingPasses:
    """The forward passes of a model since the last step.

    A pass is forgotten once a loss was computed from it and its output is gone, and if there
    are many of them: forward passes that are never backpropagated do not pile up.

    Args:
        capture: Records the calls of layers.
    """

    def __init__(self, capture: LayerCapture) -> None:
        self._capture = capture
        self._passes: list[_Pass] = []

    def begin_(self, args: tuple[Any, ...], kwargs: dict[str, Any], now: Surroundings) -> None:
        """Begin a forward pass of the model."""
        self._collect_()
        dead = [known for known in self._passes if not known.is_alive]
        for known in dead:
            known.begun = None
        pending = [known for known in dead if not known.used][-LIMIT:]
        kept = [p for p in self._passes if p not in dead or p in pending]
        self._passes = [*kept, _Pass((args, kwargs, now, {}))]

    def keep_(self, module: nn.Module, output: Tensor) -> None:
        """Keep a module's output for the forward pass that is under way."""
        current = self._passes[-1] if self._passes else None
        if current is not None and current.begun is not None and current.outputs is None:
            keep_output(current.begun[-1], module, output)

    def count_loss_(self, loss_fn: nn.Module) -> Inside | None:
        """Return the place of a loss that is being computed, if that is inside of the model."""
        current = self._passes[-1] if self._passes else None
        if current is None or not current.is_running:
            return None
        current.losses += 1
        return Inside(loss_fn, current.losses - 1)

    def end_(self, output: Any) -> None:
        """End it."""
        self._collect_()
        if self._passes:
            self._passes[-1].outputs = [weakref.ref(tensor) for tensor in tensors_of(output)]

    def of_(
        self, output: Tensor, inside: Place | None
    ) -> tuple[ForwardPass | None, list[LayerCall]]:
        """Return the forward pass that gave a loss its argument, if one did, and all calls so far.

        Args:
            output: The argument.
            inside: Where it was given, if that was inside of the pass that is under way.
        """
        self._collect_()
        places = [(known, known.place_of(output)) for known in self._passes]
        found = [(known, place) for known, place in places if place is not None]
        if inside is not None:
            found = [(self._passes[-1], inside)]
        for known in [known for known, _ in found] or self._passes:
            known.used = True
        calls = [call for known in self._passes for call in known.calls]
        if not found or found[-1][0].begun is None:
            return None, calls
        return ForwardPass(*found[-1][0].begun, found[-1][1]), calls

    def clear_(self) -> None:
        """Forget all of them."""
        self._capture.take()
        self._passes = []

    def _collect_(self) -> None:
        """Give the calls since the last time to the latest forward pass."""
        calls = self._capture.take()
        if calls and not self._passes:
            self._passes = [_Pass()]
        if calls:
            self._passes[-1].calls += calls

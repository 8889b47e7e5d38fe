"""Forward passes whose loss is still to come."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from einconv_kfac.curvature.capture import LayerCall, LayerCapture
from einconv_kfac.optim.replay import ForwardPass, Surroundings
from einconv_kfac.optim.tangents import Kept, keep_output

LIMIT = 8
"""Number of forward passes without a loss of which the layers' calls are kept."""


@dataclass(eq=False)
class _Pass:
    """A forward pass: how it began, what its layers were called with, and its output.

    Args:
        begun: Arguments, keyword arguments, surroundings and kept outputs, or ``None`` for calls of layers
            outside of a forward pass of the model.
        calls: The calls of layers.
        output: Returns the output while somebody keeps it.
        used: Whether a loss was computed from it.
    """

    begun: tuple[tuple[Any, ...], dict[str, Any], Surroundings, Kept] | None = None
    calls: list[LayerCall] = field(default_factory=list)
    output: Any = None
    used: bool = False

    def alive(self) -> Any:
        """Return the output, or ``None`` if nobody keeps it."""
        return None if self.output is None else self.output()


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
        dead = [known for known in self._passes if known.alive() is None]
        for known in dead:
            known.begun = None
        pending = [known for known in dead if not known.used][-LIMIT:]
        kept = [p for p in self._passes if p not in dead or p in pending]
        self._passes = [*kept, _Pass((args, kwargs, now, {}))]

    def keep_(self, module: nn.Module, output: Tensor) -> None:
        """Keep a module's output for the forward pass that is under way."""
        current = self._passes[-1] if self._passes else None
        if current is not None and current.begun is not None and current.output is None:
            keep_output(current.begun[-1], module, output)

    def end_(self, output: Any) -> None:
        """End it."""
        self._collect_()
        if self._passes:
            self._passes[-1].output = _reference(output)

    def of_(self, output: Any) -> tuple[ForwardPass | None, list[LayerCall]]:
        """Return the forward pass that made an output, if one did, and all calls so far."""
        self._collect_()
        found = [known for known in self._passes if known.alive() is output]
        for known in found or self._passes:
            known.used = True
        calls = [call for known in self._passes for call in known.calls]
        if not found or found[-1].begun is None:
            return None, calls
        return ForwardPass(*found[-1].begun, output), calls

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


def _reference(output: Any) -> Any:
    """Return a weak reference, or ``None`` for an output that takes none."""
    try:
        return weakref.ref(output)
    except TypeError:
        return None

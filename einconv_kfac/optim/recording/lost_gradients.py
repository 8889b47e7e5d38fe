"""Gradients that left ``.grad``, or never were in it, and that a script may put back by hand."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.optim.recording.gradient_probe import ENTRIES, Probe, entries_of, joined

ROUNDING = 4.0
"""Machine epsilons up to which a gradient counts as a combination of others."""
LOST_PASSES = 64
"""Number of the last passes, of those cleared and of those returned, that are compared."""
RETURNED_ENTRIES = 256
"""Number of entries of each gradient that `torch.autograd.grad` returned."""
EXPLAINED = 0.5
"""Part of what the last passes do not explain of the present gradients from which on cleared ones
that explain it count as put back. Clipping by value and noise have nothing to do with those."""
REMEDY = (
    "Backpropagate all losses that belong to the step, without `zero_grad` in between: gradients "
    "add up in `.grad`. Gradients of single losses for a combination of them are those of "
    "`torch.autograd.grad(loss, parameters, retain_graph=True)` before one `backward` of the sum "
    "of the same losses, after which `.grad` may be overwritten."
)
CLEARED = (
    "The gradients of a step must be those of the backward passes since `zero_grad`, got also "
    "those of earlier passes, which were cleared: they were put back by hand, without their "
    f"losses. {REMEDY} If the earlier passes do not count, call `discard()` of the optimizer "
    "where their gradients are cleared."
)
RETURNED = (
    "The gradients of a step must be those of the losses that are backpropagated, got also "
    f"gradients that `torch.autograd.grad` returned, of a loss that was not. {REMEDY}"
)


@dataclass(frozen=True)
class _Returned:
    """Gradients that a pass returned, and did not add to ``.grad``.

    Args:
        owner: The loss.
        values: Entries of the gradients, by parameter.
    """

    owner: weakref.ref[object]
    values: dict[nn.Parameter, Tensor] = field(default_factory=dict)


class LostGradients:
    """Finds out whether gradients of passes that do not count are part of those of a step.

    Attributes:
        is_any: Whether there were passes that do not count.
        is_new: Whether there were no passes at all.
    """

    def __init__(self) -> None:
        self._returned: list[_Returned] = []
        self._landed: weakref.WeakSet[object] = weakref.WeakSet()
        self._cleared: list[dict[nn.Parameter, Tensor]] = []
        self._fault = ""
        self.is_any, self.is_new = False, True

    def clear_(self, probes: Sequence[Probe]) -> None:
        """Count the passes so far as cleared.

        Args:
            probes: Their gradients.
        """
        cleared = {probe.parameter: probe.value for probe in probes}
        self._cleared = [*self._cleared, cleared][-LOST_PASSES:]
        self._landed.clear()
        self.is_any, self.is_new = True, False

    def land_(self, owner: object) -> None:
        """Count a loss as one whose gradient is added to ``.grad``.

        Args:
            owner: The loss.
        """
        self._landed.add(owner)
        self._returned = [own for own in self._returned if own.owner() is not owner]
        self.is_any, self.is_new = bool(self._cleared or self._returned or self._fault), False

    def watch_(self, owner: object, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the gradients by parameters that the backward pass that is running returns.

        Args:
            owner: The loss.
            parameters: The parameters.
        """
        if owner in self._landed or not parameters:
            return
        own = _Returned(weakref.ref(owner))
        self._returned = [*self._returned, own][-LOST_PASSES:]
        self.is_any, self.is_new = True, False

        def keep(parameter: nn.Parameter, gradient: Tensor) -> None:
            own.values[parameter] = entries_of(gradient).flatten()[:RETURNED_ENTRIES].clone()

        hooks: list[Any] = [partial(keep, parameter) for parameter in parameters]
        handles: list[Any] = [p.register_hook(own) for p, own in zip(parameters, hooks)]  # type: ignore[no-untyped-call]

        def remove() -> None:
            for handle in handles:
                handle.remove()

        torch.autograd.Variable._execution_engine.queue_callback(remove)

    def compare_(
        self, probes: Sequence[Probe], gradients: Sequence[tuple[nn.Parameter, Tensor]]
    ) -> None:
        """Compare the present gradients with those after the last pass.

        Args:
            probes: The gradients after the last pass.
            gradients: The present gradients, with their parameters.
        """
        if self._fault or not (probes and self.is_any):
            return
        before = {probe.parameter: probe.value for probe in probes}
        found = _Change(before, gradients, ENTRIES)
        if not found.are_finite or found.is_combination([]):
            return
        returned = [own.values for own in self._returned]
        if self._cleared and self._are_put_back(before, gradients):
            self._fault = CLEARED
        elif _Change(before, gradients, RETURNED_ENTRIES).is_combination(returned):
            self._fault = RETURNED

    def _are_put_back(
        self,
        before: Mapping[nn.Parameter, Tensor],
        gradients: Sequence[tuple[nn.Parameter, Tensor]],
    ) -> bool:
        """Return whether cleared gradients are in the present ones, or in that of a parameter."""
        known = {parameter for own in self._cleared for parameter in own}
        compared = [(parameter, own) for parameter, own in gradients if parameter in known]
        if _Change(before, compared, ENTRIES).is_explained(self._cleared):
            return True
        single = [_Change(before, [own], ENTRIES) for own in compared]
        return any(own.is_combination_only_with(self._cleared) for own in single)

    def check(self) -> None:
        """Raise a ``RuntimeError`` if gradients of passes that do not count were put back."""
        if self._fault:
            raise RuntimeError(self._fault)


class _Change:
    """The present gradients, beside those after the last pass.

    Args:
        before: Entries of the gradients after the last pass, by parameter.
        gradients: The present gradients, with their parameters.
        width: Number of entries of each that are compared.
    """

    def __init__(
        self,
        before: Mapping[nn.Parameter, Tensor],
        gradients: Sequence[tuple[nn.Parameter, Tensor]],
        width: int,
    ) -> None:
        self._width = width
        self._now = {parameter: self._cut(entries_of(own)) for parameter, own in gradients}
        self._present = self._joined(self._now)
        self._before = self._joined(before)
        epsilons = [torch.finfo(own.dtype).eps for own in self._now.values()]
        self._error = ROUNDING * max(epsilons, default=0.0) * float(self._present.norm())
        self.are_finite = bool((self._present + self._before).isfinite().all())

    def _cut(self, entries: Tensor) -> Tensor:
        return entries.flatten()[: self._width]

    def _joined(self, values: Mapping[nn.Parameter, Tensor]) -> Tensor:
        """Return entries for all present gradients as one vector, zeros where there are none."""
        return joined(
            [
                self._cut(values[p] if p in values else torch.zeros_like(now)).to("cpu")
                for p, now in self._now.items()
            ]
        )

    def is_combination(self, others: Sequence[Mapping[nn.Parameter, Tensor]]) -> bool:
        """Return whether they are a combination of those after the last pass and of others.

        With fewer than four entries for each of them, a combination with others says nothing.
        """
        if others and len(self._present) < 4 * (1 + len(others)):
            return False
        return self._rest(others) <= self._error

    def is_explained(self, others: Sequence[Mapping[nn.Parameter, Tensor]]) -> bool:
        """Return whether others explain a good part of what those after the last pass do not."""
        own = self._rest([])
        return own > self._error and self._rest(others) ** 2 < (1 - EXPLAINED) * own**2

    def is_combination_only_with(self, others: Sequence[Mapping[nn.Parameter, Tensor]]) -> bool:
        """Return whether they are a combination with others, and none without them.

        That says nothing with less than two entries more than there are gradients to combine.
        """
        if len(self._present) < 3 + len(others) or self.is_combination([]):
            return False
        return self._rest(others) <= self._error

    def _rest(self, others: Sequence[Mapping[nn.Parameter, Tensor]]) -> float:
        """Return the norm of what is no combination of those after the last pass and of others."""
        vectors = [self._before, *map(self._joined, others)]
        scaled = [own / own.norm() for own in vectors if own.any()]
        if not scaled:
            return float(self._present.norm())
        matrix = torch.stack(scaled, 1)
        found = torch.linalg.lstsq(matrix, self._present.unsqueeze(1), driver="gelsd").solution
        return float((self._present - (matrix @ found).squeeze(1)).norm())

"""Trials of dampings, which a GPU makes before the host has read whether they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.step.damping.search import Trial
from einconv_kfac.optim.step.fits.fit import Fit

Begun = TypeVar("Begun")
Solved = TypeVar("Solved")


@dataclass(frozen=True)
class StagedFit(Generic[Begun, Solved]):
    """The parts of a fit, between which the host reads numbers of the device.

    Args:
        begun: Asks for the quadratic model of a step with given inverses.
        solved: Reads the model, and asks for the numbers of its minimum.
        finished_: Reads these, and returns the step.
        ahead: Asks a GPU for the step itself, and returns the fit with it.
    """

    begun: Callable[[Inverses], Begun]
    solved: Callable[[Begun], Solved]
    finished_: Callable[[Solved], Fit]
    ahead: Callable[[Fit], Fit]


@dataclass
class DampingTrials(Generic[Begun, Solved]):
    """Tries dampings of the inverses in one step; see `Trials`.

    What a GPU was asked for is read in the order in which it was asked for. When the host reads
    the numbers of one trial, the device still has others to make. Each trial is finished when it is
    needed: those that are not leave nothing behind.

    Args:
        invert: Inverts the factors with a scale of the damping.
        fit: The parts of a fit.
        is_ahead: Whether to make trials before they are needed.
    """

    invert: Callable[[float], Inverses]
    fit: StagedFit[Begun, Solved]
    is_ahead: bool
    _begun: dict[float, tuple[Inverses, Begun]] = field(default_factory=dict)
    _solved: dict[float, tuple[Inverses, Solved]] = field(default_factory=dict)

    def ask_(self, scales: Sequence[float]) -> None:
        """See `Trials`; what fails is met again when it is needed."""
        if not self.is_ahead:
            return
        for scale in scales:
            if scale in self._begun or scale in self._solved:
                continue
            try:
                inverses = self.invert(scale)
                self._begun[scale] = inverses, self.fit.begun(inverses)
            except RuntimeError:
                break

    def ahead_(self, best: Trial, scale: float) -> Trial:
        """See `Trials`."""
        if not self.is_ahead:
            return best
        if scale not in self._solved:
            self._solve_(scale)
        if self._begun or scale != [*self._solved][-1]:
            return best
        return replace(best, fit=self.fit.ahead(best.fit))

    def trial_(self, scale: float) -> Trial:
        """See `Trials`."""
        if scale not in self._solved:
            self._solve_(scale)
        inverses, solved = self._solved.pop(scale)
        return Trial(scale, inverses, self.fit.finished_(solved))

    def _solve_(self, scale: float) -> None:
        """Solve the trial of a scale, and all others that were asked for."""
        if scale not in self._begun:
            inverses = self.invert(scale)
            self._begun[scale] = inverses, self.fit.begun(inverses)
        for asked in [*self._begun]:
            inverses, begun = self._begun.pop(asked)
            try:
                self._solved[asked] = inverses, self.fit.solved(begun)
            except RuntimeError:
                if asked == scale:
                    raise

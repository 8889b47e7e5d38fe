"""A search for the damping of the inverses, by what each promises in the quadratic model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from einconv_kfac.optim.factors.refresh import Inverses
from einconv_kfac.optim.schedule import is_due
from einconv_kfac.optim.state_schema import COUNT, POSITIVE, Maybe, Record
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.fits.fit import Fit

SEARCH_PERIOD = 100
"""Steps between two searches. From as many steps on, there are none where batches differ."""
EARLY_SEARCH_SHARE = 2
"""Early in training a search is due each time the number of steps has about doubled."""
SCALE_STEP = 3.0
"""Factor between the scales of the first two trials; as long as that helps, strides grow.

From `SEARCH_PERIOD` steps on, a search goes no further than that: its scale holds for as many
steps, and the batch that decides may be unlike others.
"""
AHEAD = 2
"""Number of trials that are asked for before the first of them is read."""
SCALE_BOUNDS = (1e-3, 1e3)
"""Bounds on the scale, a multiple of the damping of the quadratic model."""


@dataclass(frozen=True)
class Trial:
    """A trial damping of the inverses.

    Args:
        scale: The damping, as a multiple of that of the quadratic model.
        inverses: The inverses with that damping.
        fit: The best step with these inverses.
    """

    scale: float
    inverses: Inverses
    fit: Fit


class Trials(Protocol):
    """Tries scales of the damping in one step."""

    def ask_(self, scales: Sequence[float]) -> None:
        """Ask a GPU for trials that are likely to be needed, before the host reads others."""

    def ahead_(self, best: Trial, scale: float) -> Trial:
        """Return the best trial so far, before the host waits for that of a scale.

        Where a GPU was asked for no other trial after that, it is asked for the step of the best.
        """

    def trial_(self, scale: float) -> Trial:
        """Return the trial of a scale."""


class DampingSearch:
    """Searches the scale of the inverses' damping that promises the largest reduction.

    Larger scales are tried as long as they help, with strides that grow, otherwise smaller ones.
    Where a long stride went too far, later searches return; they take one stride each. Martens and
    Grosse (2015) also choose among several dampings by the change that the quadratic model
    predicts.

    Where batches differ, the batch that decides is unlike those of the many steps that follow a
    late search. Training without late searches ends at lower losses there.

    Args:
        agreement: Whether batches agree, or repeat.

    Attributes:
        scale: The present scale.
        is_costly: Whether a trial takes longer than a step, so that each direction has one alone.
    """

    def __init__(self, agreement: Agreement) -> None:
        self.scale = 1.0
        self.is_costly = False
        self._agreement = agreement
        self._searched: int | None = None

    def is_due(self, step: int) -> bool:
        """Return whether to search at a step.

        Args:
            step: The number of steps taken.
        """
        if not is_due(step, self._searched, SEARCH_PERIOD, EARLY_SEARCH_SHARE):
            return False
        return self._searched is None or step < SEARCH_PERIOD or self._agreement.is_close

    def first(self, step: int) -> list[float]:
        """Return the scales that are tried first: most searches try three alone.

        The last scale of a direction is not left for itself.

        Args:
            step: The number of steps taken.
        """
        scales = [self.scale]
        for factor in (SCALE_STEP, 1 / SCALE_STEP):
            own = self._scales(step, self.scale, factor)
            scales += own[: 1 + (len(own) == AHEAD)]
        return scales

    def best_(self, step: int, trials: Trials) -> Trial:
        """Return the best trial, and keep its scale.

        Beyond the first trials, those of the following scales are asked for before one is read.

        Args:
            step: The number of steps taken.
            trials: Tries scales.
        """
        trials.ask_(self.first(step))
        start, best = self.scale, trials.trial_(self.scale)
        for factor in (SCALE_STEP, 1 / SCALE_STEP):
            scales = self._scales(step, start, factor)
            for index, scale in enumerate(scales):
                if index:
                    trials.ask_(_next(scales[index:]))
                best = trials.ahead_(best, scale)
                found = _better(best, trials.trial_(scale))
                if found is best:
                    break
                best = found
            if best.scale != start:
                break
        self.scale, self._searched = best.scale, step
        return best

    def _scales(self, step: int, start: float, factor: float) -> list[float]:
        """Return the scales to try from one on, for factors above or below 1."""
        is_short = self.is_costly or step >= SEARCH_PERIOD
        return [*_powers(start, factor)][: 1 if is_short else None]

    schema = Record({"scale": POSITIVE, "searched": Maybe(COUNT)})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers."""
        return {"scale": self.scale, "searched": self._searched}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.scale, self._searched = state["scale"], state["searched"]


def _better(best: Trial, other: Trial) -> Trial:
    """Return the better trial, the first where they are equal; no other inverses are kept."""
    return other if other.fit.rank < best.fit.rank else best


def _powers(start: float, factor: float) -> Iterator[float]:
    """Yield ``start`` times the powers 1, 3, 6, 10, ... of a factor, within `SCALE_BOUNDS`.

    Each stride is one power longer than the one before; the last one ends at the bound.
    """
    smallest, largest = SCALE_BOUNDS
    stride = 0
    while smallest <= start * factor <= largest:
        stride += 1
        for _ in range(stride):
            if smallest <= start * factor <= largest:
                start *= factor
        yield start


def _next(scales: Sequence[float]) -> Sequence[float]:
    """Return the scales to ask for next: two, and the last one not by itself."""
    return scales[: AHEAD + (len(scales) == AHEAD + 1)]

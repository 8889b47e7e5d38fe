"""When and how the inverses of layers are recomputed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.distributed.workers import ALONE, NOBODY, Workers
from einconv_kfac.optim.factors.layer_numbers import LayerNumbers
from einconv_kfac.optim.factors.running import RunningFactors
from einconv_kfac.optim.inverses.background import Pending, begun, delay
from einconv_kfac.optim.inverses.placement import Placement
from einconv_kfac.optim.inverses.protocol import Inverted, Kind
from einconv_kfac.optim.inverses.registry import with_own_tensors
from einconv_kfac.optim.schedule import intervals as intervals_of
from einconv_kfac.optim.schedule import is_due

Inverses: TypeAlias = dict[str, Inverted]
"""Damped inverses of the layers that have factors, by name."""

PASSES = 3
"""Products with each weight per row of its inputs, in a forward and a backward pass."""
SMALLEST_SIZE = 256
"""Rows of a factor from which its inversion counts: smaller ones take less time than the calls of a
layer."""


class Refresh:
    """Recomputes the inverses of layers where they are due.

    Args:
        running: The layers, by name; others may come.
        numbers: Their hyper-parameters.
        kind: The kind of inverse.
        in_background: Whether a thread inverts, except where there is no inverse yet.
        workers: The workers among which inversions are divided; threads invert all of them, since
            they must not communicate.
        owners: The workers that alone have the factors of layers.

    Attributes:
        spacing: The least number of steps between two inversions early in training.
    """

    def __init__(
        self,
        running: Mapping[str, RunningFactors],
        numbers: LayerNumbers,
        kind: Kind,
        in_background: bool,
        workers: Workers = ALONE,
        owners: Mapping[str, int] = NOBODY,
    ) -> None:
        self._placement = Placement(workers, kind, owners)
        self._running, self._numbers = running, numbers
        self._kind = kind
        self._in_background = in_background
        self._warned = False
        self.spacing = 1
        self._spaced: list[tuple[int, list[tuple[int, ...]]]] = []

    def refresh_(self, dampings: Mapping[str, float], step: int) -> None:
        """Recompute the inverses that are due, and set the damping of all.

        Args:
            dampings: Damping by layer.
            step: The step.

        Raises:
            RuntimeError: If a damped factor is not positive definite. No inverse is changed
                then, but what a thread failed at is due again.
        """
        intervals = intervals_of(step, self._periods, self.spacing)
        ready, due = self._work(intervals, step)
        known = {n for n, own in self._running.items() if n in ready or own.inverse is not None}
        later = [n for n in due if self._in_background and n in known]
        now = self._inverted({n: dampings[n] for n in due if n not in later})
        arrived = self._arrived_(ready)
        for name, found in arrived.items():
            self.use_({name: self._following(name, found)}, ready[name].begun)
        self.use_(now, step)
        self._begin_(later, dampings, intervals, step)
        self.set_damping_(dampings)

    def space_(self) -> None:
        """Find the spacing, where rows or shapes of layers have changed."""
        found = [(own.rows, own.shapes) for own in self._running.values()]
        if found != self._spaced:
            self._spaced, self.spacing = found, spacing(self._running.values())

    @property
    def _periods(self) -> Mapping[str, int]:
        """The largest number of steps between two inversions, by layer."""
        return self._numbers.of("inverse_update_period")

    def set_damping_(self, dampings: Mapping[str, float]) -> None:
        """Set the damping of the inverses, where that needs no decomposition."""
        if self._kind.damping_needs_decomposition:
            return
        for name, own in self._running.items():
            own.inverse = own.inverse and own.inverse.with_damping(dampings[name])

    def is_due(self, step: int) -> bool:
        """Return whether `refresh_` has inverses to compute or to take over.

        Args:
            step: The step.
        """
        running, periods, least = self._running.items(), self._periods, self.spacing
        begun = [own.pending.due for _, own in running if own.pending is not None]
        last = {(own.inverse_step, periods[n]) for n, own in running if own.pending is None}
        is_inverted = any(is_due(step, *own, least=least) for own in last)
        return is_inverted or any(due <= step for due in begun)

    def may_search(self, step: int) -> bool:
        """Return whether a step may invert with several dampings.

        Where inversions are costly, that is the first step, and later ones where all are due.

        Args:
            step: The step.
        """
        if self.spacing == 1:
            return True
        due = intervals_of(step, self._periods, self.spacing)
        last = {(own.inverse_step, due[name]) for name, own in self._running.items()}
        is_late = step >= self.spacing
        return all(known is None or (is_late and step - known >= own) for known, own in last)

    def _work(
        self, intervals: Mapping[str, int], step: int
    ) -> tuple[dict[str, Pending], list[str]]:
        """Return the inverses that threads have ready, and the layers to invert."""
        pending = {n: own.pending for n, own in self._running.items() if own.pending is not None}
        ready = {name: one for name, one in pending.items() if one.due <= step}
        due = [n for n in self._running if n in ready or n not in pending]
        return ready, [n for n in due if self._is_due(n, ready.get(n), intervals[n], step)]

    def bases(self) -> dict[str, EigenBlock]:
        """Return the eigenbases in which squared gradients are averaged, by layer."""
        if not self._kind.needs_per_example_gradients:
            return {}
        inverses = {n: own.inverse for n, own in self._running.items() if own.inverse is not None}
        bases = {name: inverse.eigenbasis for name, inverse in inverses.items()}
        return {name: basis for name, basis in bases.items() if basis is not None}

    def trial(self) -> Callable[[Mapping[str, float]], Inverses]:
        """Return a function that inverts with dampings by layer; it raises like `refresh_`.

        Where another damping needs no new decomposition, its calls share one.
        """
        shared: list[Inverses] = []

        def invert(dampings: Mapping[str, float]) -> Inverses:
            if not shared or self._kind.damping_needs_decomposition:
                shared[:] = [self._inverted(dampings)]
            return {
                name: replace(found, inverse=found.inverse.with_damping(dampings[name]))
                for name, found in shared[0].items()
            }

        return invert

    def use_(self, inverses: Inverses, step: int) -> None:
        """Take over inverses of a step's factors, instead of any that are to come."""
        for name, found in inverses.items():
            self._running[name].use_(found, step)
            if found.retries and not self._warned:
                self._warned = True
                warnings.warn(
                    f"The damped factors of '{name}' were not positive definite in their dtype; "
                    f"they were inverted in float64, with damping {found.inverse.damping:.3g}. "
                    "`statistics` counts such cases as 'cholesky_retries'. A larger `damping` "
                    "avoids them.",
                    RuntimeWarning,
                    stacklevel=2,
                )

    def _is_due(self, name: str, ready: Pending | None, interval: int, step: int) -> bool:
        """Return whether a layer's factors are to be inverted."""
        last = self._running[name].inverse_step if ready is None else ready.begun
        return last is None or step - last >= interval

    def _inverted(self, dampings: Mapping[str, float]) -> Inverses:
        """Return the inverses of layers that have factors."""
        wanted = [self._running[name].task(damping) for name, damping in dampings.items()]
        tasks = [task for task in wanted if task is not None]
        found = self._placement.inverted(tasks) if tasks else []
        return {task.name: self._following(task.name, one) for task, one in zip(tasks, found)}

    def _following(self, name: str, found: Inverted) -> Inverted:
        """Return an inverse with the statistics of the layer's present one."""
        return replace(found, inverse=found.inverse.with_statistics_of(self._running[name].inverse))

    def _arrived_(self, ready: Mapping[str, Pending]) -> Inverses:
        """Return the inverses of threads, or drop those that failed and raise their error."""
        errors = {name: pending.found.error() for name, pending in ready.items()}
        failed = {name: error for name, error in errors.items() if error is not None}
        for name in failed:
            self._running[name].pending = None
        for error in failed.values():
            raise error
        return {name: self._own(name, pending.found.of(name)) for name, pending in ready.items()}

    def _own(self, name: str, found: Inverted) -> Inverted:
        """Return an inverse whose tensors are aligned as those of a loaded state are."""
        layout = self._running[name].layer.layout
        return replace(found, inverse=with_own_tensors(found.inverse, layout))

    def _begin_(
        self,
        names: Sequence[str],
        dampings: Mapping[str, float],
        intervals: Mapping[str, int],
        step: int,
    ) -> None:
        """Have a thread invert the factors of layers."""
        if names:
            wanted = [self._running[name].task(dampings[name]) for name in names]
            found = begun(self._kind.timed, [task for task in wanted if task is not None])
            for name in names:
                self._running[name].pending = Pending(step, step + delay(intervals[name]), found)


def spacing(layers: Iterable[RunningFactors]) -> int:
    """Return the least number of steps between two inversions early in training.

    In as many steps, forward and backward passes take at most as many operations as an inversion of
    all factors: ``d^3`` for one of ``d`` rows, and ``6 n co d`` for ``n`` rows of inputs of a layer
    with ``d`` inputs and ``co`` outputs. It follows from shapes, so that all workers, and a run
    that is resumed, have the same.

    Args:
        layers: The layers; those whose calls were not seen do not count.
    """
    inversions = passes = 0
    for own in layers:
        if own.rows:
            inversions += _inversion_operations(own)
            passes += 2 * PASSES * own.rows * _entries(own)
    return max(1, inversions // passes) if passes else 1


def _inversion_operations(running: RunningFactors) -> int:
    """Return the operations of the inversions of a layer's factors, as far as they count."""
    sizes = [(shape[0], shape[-1]) for shape in running.shapes if shape[1:-1]]  # not diagonal
    return sum(groups * size**3 for groups, size in sizes if size >= SMALLEST_SIZE)


def _entries(running: RunningFactors) -> int:
    """Return the entries that a row of inputs meets; a one-hot one is looked up."""
    layer = running.layer
    return 0 if all(use.rule.one_hot for use in layer.uses) else prod(layer.layout.shape)

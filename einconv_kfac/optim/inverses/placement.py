"""Which worker inverts the factors of which layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from einconv_kfac.distributed.workers import NOBODY, Workers
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, Task
from einconv_kfac.optim.inverses.registry import inverse_of


class Placement:
    """Divides inversions among workers, each of which has every inverse afterwards.

    Args:
        workers: The workers.
        kind: The kind of inverse.
        owners: The workers that alone have the factors of layers, and so invert them. Of other
            layers the largest are assigned first, each to who has least work.
    """

    def __init__(self, workers: Workers, kind: Kind, owners: Mapping[str, int] = NOBODY) -> None:
        self._workers = workers
        self._kind, self._owners = kind, owners

    def inverted(self, tasks: Sequence[Task]) -> list[Inverted]:
        """Invert the factors of layers; the order of tasks is the same on all workers.

        Raises:
            RuntimeError: If a damped factor is not positive definite.
        """
        free = [task for task in tasks if task.name not in self._owners]
        ranks = self._workers.assigned([task.work for task in free])
        owners = {**self._owners, **{task.name: rank for task, rank in zip(free, ranks)}}
        rank = self._workers.rank
        chosen = [index for index, task in enumerate(tasks) if owners[task.name] == rank]
        own = [tasks[index] for index in chosen]
        found = dict(zip(chosen, self._kind.timed(own))) if own else {}
        shared = self._workers.shared(found, _state, lambda i, s: _inverted(tasks[i], s))
        return [shared[index] for index in range(len(tasks))]


def _state(found: Inverted) -> dict[str, Any]:
    """Return what is sent of an inverse."""
    return {
        "inverse": found.inverse.state_dict(),
        "conditions": found.conditions,
        "retries": found.retries,
        "seconds": found.seconds,
    }


def _inverted(task: Task, state: Mapping[str, Any]) -> Inverted:
    """Return an inverse that was sent."""
    inverse = inverse_of(state["inverse"], task.layout, state["conditions"].device)
    return Inverted(inverse, state["conditions"], state["retries"], state["seconds"])

"""Which worker inverts the factors of which layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from einconv_kfac.distributed.workers import Workers
from einconv_kfac.optim.inverses.protocol import Inverted, Kind, Task
from einconv_kfac.optim.inverses.registry import inverse_of


class Placement:
    """Divides inversions among workers, each of which has every inverse afterwards.

    Args:
        workers: The workers.
        kind: The kind of inverse.
    """

    def __init__(self, workers: Workers, kind: Kind) -> None:
        self._workers = workers
        self._kind = kind

    def inverted(self, tasks: Sequence[Task]) -> list[Inverted]:
        """Invert the factors of layers; the order of tasks is the same on all workers.

        Raises:
            RuntimeError: If a damped factor is not positive definite.
        """
        chosen = self._workers.chosen([task.work for task in tasks])
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
    inverse = inverse_of(state["inverse"], task.layout, task.factors[0].device)
    return Inverted(inverse, state["conditions"], state["retries"], state["seconds"])

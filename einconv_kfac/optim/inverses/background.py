"""Inverses that a thread computes during the training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from einconv_kfac.optim.inverses.protocol import Inverted, Task

DELAYS_PER_PERIOD = 10
"""Period of the inverses, divided by the number of steps until a thread's inverse is used."""


@dataclass(frozen=True)
class Pending:
    """An inverse that a thread computes.

    The step that starts to use it does not depend on when the thread finishes.

    Args:
        begun: The step whose factors are inverted.
        due: The step that starts to use the inverse.
        found: Inverses by layer, when the thread has finished.
    """

    begun: int
    due: int
    found: Future[dict[str, Inverted]]

    @property
    def has_failed(self) -> bool:
        """Whether the thread has finished with an error."""
        return self.found.done() and self.found.exception() is not None

    @staticmethod
    def of(begun: int, due: int, name: str, inverted: Inverted) -> Pending:
        """Return one that is already computed."""
        found: Future[dict[str, Inverted]] = Future()
        found.set_result({name: inverted})
        return Pending(begun, due, found)


def delay(interval: int) -> int:
    """Return the number of steps until an inverse is used: a tenth of its period."""
    return max(1, interval // DELAYS_PER_PERIOD)


def begun(
    invert: Callable[[Sequence[Task]], list[Inverted]], tasks: Sequence[Task]
) -> Future[dict[str, Inverted]]:
    """Start a thread that inverts the present factors.

    On a GPU the thread enqueues its work in the current stream.

    Args:
        invert: Inverts the factors of layers, as `Kind.timed`.
        tasks: The layers and their factors, which are copied.
    """
    copies = [replace(t, factors=(t.factors[0].clone(), t.factors[1].clone())) for t in tasks]
    device = copies[0].factors[0].device
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def work() -> dict[str, Inverted]:
        with torch.no_grad(), torch.cuda.stream(stream):
            return {task.name: found for task, found in zip(copies, invert(copies))}

    threads = ThreadPoolExecutor(1, thread_name_prefix="kfac")
    future = threads.submit(work)
    threads.shutdown(wait=False)
    return future

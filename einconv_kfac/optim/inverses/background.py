"""Inverses that a thread computes while training goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import torch

from einconv_kfac.optim.inverses.registry import Inverted, Task

SHARE = 10
"""The period of the inverses is this multiple of the steps that a thread has for them."""


@dataclass(frozen=True)
class Pending:
    """An inverse to come.

    Which step takes it over does not depend on when the thread is done.

    Args:
        begun: The step whose factors it inverts.
        due: The step that takes it over.
        found: Inverses by layer, once they are there.
    """

    begun: int
    due: int
    found: Future[dict[str, Inverted]]

    @staticmethod
    def of(begun: int, due: int, name: str, inverted: Inverted) -> Pending:
        """Return one that is there."""
        found: Future[dict[str, Inverted]] = Future()
        found.set_result({name: inverted})
        return Pending(begun, due, found)


def delay(interval: int) -> int:
    """Return the number of steps until an inverse is taken over: a tenth of its period."""
    return max(1, interval // SHARE)


def begun(
    invert: Callable[[Sequence[Task]], list[Inverted]], tasks: Sequence[Task]
) -> Future[dict[str, Inverted]]:
    """Begin to invert factors as they are now, in a thread.

    On a GPU the thread enqueues its work in the present stream.

    Args:
        invert: What inverts.
        tasks: The layers and their factors, of which the thread takes copies.
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

"""Inverses that a thread computes during the training steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.side_stream import SideStream
from einconv_kfac.optim.inverses.protocol import Inverted, Task

DELAYS_PER_PERIOD = 10
"""Period of the inverses, divided by the number of steps until a thread's inverse is used."""


class Inversion:
    """Inverses by layer that a thread computes.

    On a GPU it asks for them in a stream of its own, so that they do not delay the steps meanwhile.

    Args:
        future: The inverses, when the thread has asked for them.
        stream: Where it does.
    """

    def __init__(self, future: Future[dict[str, Inverted]], stream: SideStream) -> None:
        self._future, self._stream = future, stream

    @property
    def has_failed(self) -> bool:
        """Whether the thread has finished with an error."""
        return self._future.done() and self._future.exception() is not None

    def error(self) -> BaseException | None:
        """Return the error of the thread, for which the host waits."""
        return self._future.exception()

    def of(self, name: str) -> Inverted:
        """Return the inverse of a layer; the host waits for the thread, and not for the device.

        What is asked of the present stream from now on comes after the inversion.
        """
        found = self._future.result()[name]
        self._stream.join_(_tensors(found))
        return found


@dataclass(frozen=True)
class Pending:
    """An inverse that a thread computes.

    The step that starts to use it does not depend on when the thread finishes.

    Args:
        begun: The step whose factors are inverted.
        due: The step that starts to use the inverse.
        found: The inverses of several layers.
    """

    begun: int
    due: int
    found: Inversion

    @staticmethod
    def of(begun: int, due: int, name: str, inverted: Inverted) -> Pending:
        """Return one that is already computed."""
        future: Future[dict[str, Inverted]] = Future()
        future.set_result({name: inverted})
        return Pending(begun, due, Inversion(future, SideStream(torch.device("cpu"))))


def _tensors(inverted: Inverted) -> list[Tensor]:
    """Return the tensors of an inverse."""
    state = inverted.inverse.state_dict().values()
    return [inverted.conditions, *(value for value in state if isinstance(value, Tensor))]


def delay(interval: int) -> int:
    """Return the number of steps until an inverse is used: a tenth of its period."""
    return max(1, interval // DELAYS_PER_PERIOD)


def begun(invert: Callable[[Sequence[Task]], list[Inverted]], tasks: Sequence[Task]) -> Inversion:
    """Start a thread that inverts the present factors.

    Args:
        invert: Inverts the factors of layers, as `Kind.timed`.
        tasks: The layers and their factors, which are copied.
    """
    copies = [task.copied() for task in tasks]
    stream = SideStream(copies[0].factors[0].device)
    stream.follow_(factor for task in copies for factor in task.factors)

    def work() -> dict[str, Inverted]:
        with torch.no_grad(), stream.working():
            return {task.name: found for task, found in zip(copies, invert(copies))}

    threads = ThreadPoolExecutor(1, thread_name_prefix="kfac")
    future = threads.submit(work)
    threads.shutdown(wait=False)
    return Inversion(future, stream)

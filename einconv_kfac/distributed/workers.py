"""The workers that train one model together.

Worker ``r`` of ``N`` sees batches of its own, and torch's `DistributedDataParallel` leaves the
gradient of the mean over workers in ``.grad``. So ``N`` workers are one worker that accumulates
all their batches, each loss divided by ``N``: every sum over batches becomes a sum over batches
and workers, and nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from einconv_kfac.distributed.summable import Summable

S = TypeVar("S", bound=Summable)
R = TypeVar("R")
NOBODY: Mapping[str, int] = {}
Numbers: TypeAlias = Sequence[Any]
"""Numbers, and small tensors of them."""


@dataclass(frozen=True)
class Same:
    """What must be the same on all workers.

    Args:
        values: Values with a ``repr``, by what they are.
        norms: Norms of tensors, of which some may have other last bits, by what they are.
    """

    values: Mapping[str, object] = field(default_factory=dict)
    norms: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)


Compared: TypeAlias = Callable[[], Same]
"""Returns what must be the same on all workers; one worker does not call it."""


class WorkersError(RuntimeError):
    """The workers differ, or one of them failed or was lost; it is raised on all that are left."""


class Workers:
    """One worker, on its own: sums and means are those of its own numbers.

    A question is a short text that says what is asked, the same on all workers. Those that ask
    different questions raise a `WorkersError` instead of mixing up their numbers.

    Args:
        in_group: Whether the worker is alone in a process group.

    Attributes:
        rank: The worker's number.
        size: The number of workers.
    """

    rank = 0
    size = 1

    def __init__(self, *, in_group: bool = False) -> None:
        self._in_group = in_group

    def together(self) -> AbstractContextManager[None]:
        """Return a context for a step of all workers; an error of one is one of all."""
        return nullcontext()

    def agree(self, flag: Tensor, question: str, same: Compared = Same) -> bool:
        """Return whether a flag is set on every worker; the host waits for it.

        Args:
            flag: The flag, one number.
            question: What is asked.
            same: Returns what must be the same on all workers.

        Raises:
            WorkersError: If something is not the same; norms may differ where the flag is not set.
        """
        return bool(flag)

    def means(self, numbers: Numbers, question: str) -> Sequence[Any]:
        """Return the means over workers of a few real numbers, the same bits on all of them.

        Args:
            numbers: Numbers, or small tensors of them.
            question: What is asked.

        Returns:
            The means, in float64.
        """
        return numbers

    def combined(
        self,
        sums: dict[str, S],
        complete: Callable[[], dict[str, S]],
        owners: Mapping[str, int] = NOBODY,
    ) -> dict[str, S]:
        """Return sums over the examples of all workers, by layer.

        Args:
            sums: Those of this worker.
            complete: Returns them with empty ones for other layers that some worker may have.
            owners: The workers that alone need the sums of layers.
        """
        return sums

    def expect_(
        self, complete: Callable[[], Mapping[str, Summable]], owners: Mapping[str, int] = NOBODY
    ) -> None:
        """Prepare for sums that `begin_` adds up.

        Args:
            complete: Returns the layers of the next `combined`, with sums or without.
            owners: See `combined`.
        """

    def begin_(self, complete: Callable[[], Mapping[str, Summable]]) -> None:
        """Begin to add up sums that `combined` will ask for, if all workers expect the same.

        Args:
            complete: Returns the layers, with the sums of this worker.
        """

    def drop_(self) -> None:
        """Have `combined` not use what `begin_` has begun, since the sums have changed."""

    def assigned(self, costs: Sequence[float], loads: Sequence[float] = ()) -> list[int]:
        """Return the worker of each task: the largest first, each to who has least work.

        Args:
            costs: The work of each task.
            loads: The work that each worker has already; none by default.
        """
        loads, found = [*loads] or [0.0] * self.size, [0] * len(costs)
        for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
            found[index] = rank = loads.index(min(loads))
            loads[rank] += costs[index]
        return found

    def shared(
        self,
        found: Mapping[int, R],
        pack: Callable[[R], Any],
        unpack: Callable[[int, Any], R],
    ) -> Mapping[int, R]:
        """Return the results of the tasks of all workers, by index.

        Args:
            found: Those of this worker.
            pack: Returns containers of tensors and numbers that describe a result.
            unpack: Makes a result of its index and its containers.
        """
        return found

    def number(self, index: int) -> int:
        """Return the number of this worker's micro-batch of an index among those of all."""
        return index

    def check(self, owner: str) -> None:
        """Raise a ``RuntimeError`` if the process has joined other workers since.

        Args:
            owner: Name of the class that trains.
        """
        distributed = torch.distributed
        is_joined = distributed.is_available() and distributed.is_initialized()
        if self._in_group or not is_joined:
            return
        if (size := distributed.get_world_size()) > 1:
            raise RuntimeError(
                f"{owner} must be made after `init_process_group`, got one made before and a "
                f"process group of {size}. Make it again, and load its state."
            )


ALONE = Workers()
"""One worker."""

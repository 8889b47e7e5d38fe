"""The collectives of a process group that large messages need, begun together and awaited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from einconv_kfac.distributed.workers import WorkersError
from einconv_kfac.torch_versions import all_gather_single


class Collectives:
    """Collectives of one process group; each returns what `wait` takes.

    Args:
        group: The process group.
        device: The device of tensors.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self._group, self.device = group, device
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def added_up_(self, tensor: Tensor, receiver: int | None = None) -> Any:
        """Begin to add a tensor up over workers, in place, for one of them or for all."""
        with lost():
            if receiver is None:
                return dist.all_reduce(tensor, group=self._group, async_op=True)
            target = dist.get_global_rank(self._group, receiver)
            return dist.reduce(tensor, target, group=self._group, async_op=True)

    def sent_by_(self, rank: int, tensor: Tensor) -> Any:
        """Begin to send a tensor from one worker to all, in place."""
        source = dist.get_global_rank(self._group, rank)
        with lost():
            return dist.broadcast(tensor, source, group=self._group, async_op=True)

    def exchanged_(self, received: Tensor, parts: Sequence[Tensor]) -> Any:
        """Begin to send a part to each worker, and to receive one from each.

        Args:
            received: Receives one part of each worker, ``[workers, length]``.
            parts: The parts, of one dimension, of lengths that all workers send alike.
        """
        sent = torch.cat([_bytes(part) for part in parts])
        sizes = [part.numel() * part.element_size() for part in parts]
        own = [sizes[self.rank]] * self.size
        with lost():
            return dist.all_to_all_single(
                _bytes(received), sent, own, sizes, group=self._group, async_op=True
            )

    def collected_(self, received: Tensor, part: Tensor) -> Any:
        """Begin to collect a part of each worker on all, ``[workers, length]``."""
        with lost():
            return all_gather_single(
                _bytes(received), _bytes(part), group=self._group, async_op=True
            )

    def objects(self, value: Any) -> list[Any]:
        """Return a value of every worker."""
        found: list[Any] = [None] * self.size
        with lost():
            dist.all_gather_object(found, value, group=self._group)
        return found


def wait(work: Any) -> None:
    """Wait until a message has arrived."""
    with lost():
        work.wait()


@contextmanager
def lost() -> Iterator[None]:
    """Raise a `WorkersError` where torch cannot reach another worker."""
    try:
        yield
    except RuntimeError as error:
        raise WorkersError(
            f"All workers must be reached, got {type(error).__name__}: {error}. Restart them from "
            "a saved state."
        ) from error


def _bytes(tensor: Tensor) -> Tensor:
    """Return the memory of a tensor; not every backend sends every data type."""
    return tensor.flatten().view(torch.uint8)

"""The workers of a process group of ``torch.distributed``."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from einconv_kfac.distributed.collectives import Collectives, wait
from einconv_kfac.distributed.early_sums import Channel, EarlySums, Found
from einconv_kfac.distributed.message import HEADER, LENGTH, PAYLOAD, Answer, failure, header
from einconv_kfac.distributed.parcel import emptied, filled, packing_of
from einconv_kfac.distributed.reduction import Reduction
from einconv_kfac.distributed.summable import (
    Summable,
    counts_of,
    receivers_of,
    replace_,
    tensors_of,
    wanted_of,
)
from einconv_kfac.distributed.triangles import Packing, Symmetric
from einconv_kfac.distributed.workers import (
    NOBODY,
    Compared,
    Numbers,
    R,
    S,
    Same,
    Workers,
    WorkersError,
)
from einconv_kfac.distributed.wrappers import check_joining

COMMIT = "the end of the step"
SMALLEST_NORM = 2.0**-1000
"""Norms below count as this one, whose logarithm is finite."""
NORM_TOLERANCE = 1e-6
"""Relative difference up to which norms of gradients count as the same."""


class ProcessGroup(Workers):
    """The workers of a process group.

    A step of every worker is the same sequence of messages, which ends with one that the step was
    taken, or with one that it failed. Large messages follow a small one, so that they have the
    same shapes, and no worker fails between the two.

    Args:
        group: The process group, of more than one process.
        device: The device of small messages.
        dtype: The data type in which sums of matrices are sent, if theirs has more bits.
        wrapper: What averages gradients, if torch does.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype | None = None,
        wrapper: DistributedDataParallel | None = None,
    ) -> None:
        self._collectives, self._device = Collectives(group, device), device
        self._group, self._dtype, self._early = group, dtype, EarlySums(group, dtype)
        self.rank, self.size = self._collectives.rank, self._collectives.size
        self._wrapper = wrapper
        self._last: tuple[Any, Tensor] | None = None  # the message that the last step was taken

    @contextmanager
    def together(self) -> Iterator[None]:
        """See `Workers`."""
        self._check_last_()
        try:
            yield
        except WorkersError:
            raise  # on all workers
        except BaseException as error:
            self._report_(error)
            raise
        self._last = self._sent(self._message(COMMIT, {"plan": self._early.agree_()}))

    def agree(self, flag: Tensor, question: str, same: Compared = Same) -> bool:
        """See `Workers`."""
        known = same()
        logs = [_log_norm(tensors, self._device) for tensors in known.norms.values()]
        numbers = [flag.double(), *(n for log in logs for n in (log, log.square()))]
        asked = {**known.values, "kinds of tensors": [*known.norms]}
        is_set, *found = (float(number) for number in self._asked(numbers, question, asked))
        if is_set < 1:
            return False
        for name, mean, square in zip(known.norms, found[::2], found[1::2]):
            if square - mean**2 > (NORM_TOLERANCE * (1 + abs(mean))) ** 2:
                raise WorkersError(
                    f"All workers must have the same {name}, got norms that differ by a factor of "
                    f"about {2 ** (square - mean**2) ** 0.5:.3g}. Wrap the model in "
                    "DistributedDataParallel, and backpropagate the last micro-batch of each step "
                    "outside of `no_sync`."
                )
        return True

    def means(self, numbers: Numbers, question: str) -> Sequence[Any]:
        """See `Workers`."""
        return self._asked(numbers, question, {})

    def combined(
        self,
        sums: dict[str, S],
        complete: Callable[[], dict[str, S]],
        owners: Mapping[str, int] = NOBODY,
    ) -> dict[str, S]:
        """See `Workers`."""
        layers, early = complete(), self._early
        counts = Reduction([counts_of(layers, self._device)], [None], self._collectives)
        own = [float(early.is_current), float(early.is_wanted and early.channel is None)]
        are_current, want = self._asked(own, "sums", {"shapes of sums": counts.signature})
        early.finish_()
        found = early.found(layers) if are_current == 1 else None
        replace_(layers, *(found or self._found(layers, counts, owners)))
        if want == 1:
            early.channel = Channel.of(self._group, self._device)
        return layers

    def _found(
        self, layers: Mapping[str, Summable], counts: Reduction, owners: Mapping[str, int]
    ) -> Found:
        """Return sums over workers, in two rounds of messages."""
        counts.begin_()
        (total,) = counts.found()
        assert total is not None
        wanted = wanted_of(layers, total)
        self._early.learn_(layers, wanted)
        receivers = receivers_of(layers, wanted, owners)
        return total, wanted, self._sums(tensors_of(layers, wanted), receivers)

    def _sums(
        self, tensors: Sequence[Tensor | Symmetric], receivers: Sequence[int | None]
    ) -> Sequence[Tensor | None]:
        """Return the sums of tensors over workers, in few messages for each receiver."""
        if not tensors:
            return []
        reduction = Reduction(tensors, receivers, self._collectives, self._dtype)
        self._asked([], "sums", {"shapes of sums": reduction.signature})
        reduction.begin_()
        return reduction.found()

    def expect_(
        self, complete: Callable[[], Mapping[str, Summable]], owners: Mapping[str, int] = NOBODY
    ) -> None:
        """See `Workers`."""
        self._early.plan_(complete(), owners)

    def begin_(self, complete: Callable[[], Mapping[str, Summable]]) -> None:
        """See `Workers`."""
        self._early.begin_(complete, self._have_agreed)

    def drop_(self) -> None:
        """See `Workers`."""
        self._early.drop_()

    def _have_agreed(self) -> bool:
        """Return whether all workers took the last step, and plan the same for the next."""
        if self._last is None:
            return False
        work, message = self._last
        wait(work)
        answer = Answer(message.tolist(), self.size)
        return not answer.failed and answer.is_common and answer.is_same and answer.is_level

    def shared(
        self,
        found: Mapping[int, R],
        pack: Callable[[R], Any],
        unpack: Callable[[int, Any], R],
    ) -> Mapping[int, R]:
        """See `Workers`; every worker has what was sent, to the bit, also of its own results."""
        empty, tensors = emptied({index: pack(result) for index, result in found.items()})
        self._asked([], "results", {})
        containers = self._collectives.objects(empty)
        packings = [
            Packing(tensors) if rank == self.rank else packing_of(own, self._device)
            for rank, own in enumerate(containers)
        ]
        works = [
            self._collectives.sent_by_(rank, buffer)
            for rank, p in enumerate(packings)
            for buffer in p.buffers
        ]
        for work in works:
            wait(work)
        sent = [filled(own, p.unpacked()) for own, p in zip(containers, packings)]
        return {index: unpack(index, value) for own in sent for index, value in own.items()}

    def number(self, index: int) -> int:
        """See `Workers`."""
        return index * self.size + self.rank

    def check(self, owner: str) -> None:
        """See `Workers`; that the group is still there is found by the next message."""
        if self._wrapper is not None:
            check_joining(self._wrapper, owner)

    def _asked(self, numbers: Numbers, question: str, same: Mapping[str, object]) -> list[Tensor]:
        """Return the means of numbers, once all workers have asked the same question."""
        tensors = [torch.as_tensor(n, dtype=torch.float64).to(self._device) for n in numbers]
        flat = [tensor.flatten() for tensor in tensors]
        payload = torch.cat(flat) if flat else torch.empty(0, device=self._device)
        found = [self._part(p, question, same) for p in torch.split(payload, PAYLOAD)]
        means = torch.cat(found) / self.size
        sizes = [tensor.numel() for tensor in tensors]
        return [m.view(t.shape) for m, t in zip(torch.split(means, sizes), tensors)]

    def _part(self, payload: Tensor, question: str, same: Mapping[str, object]) -> Tensor:
        """Send one message, check it, and return the sums of its payload."""
        work, message = self._sent(self._message(question, same, payload))
        wait(work)
        answer = Answer(message.tolist(), self.size)
        if answer.failed:
            raise WorkersError(f"The step must succeed on all workers, {answer.reason()}.")
        if not answer.is_common:
            questions = self._collectives.objects(question)
            raise WorkersError(
                f"The workers must do the same in each step, got {questions[0]} on worker 0 and "
                f"{next(q for q in questions if q != questions[0])} on another."
            )
        if not answer.is_same:
            raise self._difference(same)
        if not answer.is_level:
            self._early.level_(self._collectives)
        return message[HEADER : HEADER + len(payload)]

    def _message(
        self, question: str, same: Mapping[str, object] | None = None, payload: Tensor | None = None
    ) -> Tensor:
        """Return a message on the device."""
        start = header(question, same or {}, self._early.count)
        message = torch.tensor([*start, *[0.0] * (LENGTH - HEADER)], dtype=torch.float64)
        message = message.to(self._device)
        if payload is not None:
            message[HEADER : HEADER + len(payload)] = payload
        return message

    def _sent(self, message: Tensor) -> tuple[Any, Tensor]:
        """Begin to add a message up over workers."""
        return self._collectives.added_up_(message), message

    def _report_(self, error: BaseException) -> None:
        """Tell the other workers that this one failed, in place of the message they wait for.

        If they had taken the step by then, all raise an error at the beginning of the next.
        """
        message = torch.tensor(failure(self.rank, error), dtype=torch.float64).to(self._device)
        try:
            work, message = self._sent(message)
            wait(work)
        except WorkersError:
            return  # the error at hand says more
        answer = Answer(message.tolist(), self.size)
        if answer.failed < self.size and answer.asked(COMMIT):
            self._last = work, message

    def _check_last_(self) -> None:
        """Raise a `WorkersError` if a worker failed where the others had taken the last step."""
        last, self._last = self._last, None
        if last is None:
            return
        wait(last[0])
        answer = Answer(last[1].tolist(), self.size)
        if answer.failed:
            raise WorkersError(
                f"The last step must have been taken by all workers, {answer.reason()}. Load a "
                "saved state of the model and the optimizer on all."
            )

    def _difference(self, same: Mapping[str, object]) -> WorkersError:
        """Return the error for what is not the same on all workers; all of them call it."""
        found = self._collectives.objects({name: repr(value) for name, value in same.items()})
        for name in found[0]:
            for rank, other in enumerate(found):
                if other.get(name) != found[0][name]:
                    return WorkersError(
                        f"All workers must have the same {name}, got {found[0][name]} on worker 0 "
                        f"and {other.get(name)} on worker {rank}."
                    )
        return WorkersError("All workers must have the same state, got different ones.")


def _log_norm(norms: Sequence[Tensor], device: torch.device) -> Tensor:
    """Return the binary logarithm of the norm of tensors, from those of each."""
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    norm: Tensor = torch.linalg.vector_norm(torch.stack(list(norms)).double())
    return norm.clamp_min(SMALLEST_NORM).log2()

"""Streams of the simulated device: what was asked for in one is known in another after an event.

The processor computes everything at once. But each launch has a time in its stream, each tensor is
known to be written at one, and a stream that reads it without having waited for that time, as a
GPU could before it is there, is noted as a race. What one thread of the host has waited for counts
for that thread alone, which is stricter than a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

from record import Record
from torch import Tensor


class Stream:
    """A stream.

    Attributes:
        time: Number of its launches.
        known: For other streams, by their number, the time up to which it has waited.
    """

    count = 0

    def __init__(self, device: Any = None) -> None:
        Stream.count += 1
        self.number, self.device = Stream.count, device
        self.time = 0
        self.known: dict[int, int] = {}

    def wait_event(self, event: Event) -> None:
        """Let what is asked for from now on come after an event."""
        _merge(self.known, event.known)

    def wait_stream(self, other: Stream) -> None:
        """Let what is asked for from now on come after what another was asked for."""
        _merge(self.known, {**other.known, other.number: other.time})

    def synchronize(self) -> None:
        """Let this thread wait for the stream."""
        _merge(host_known(), {**self.known, self.number: self.time})


class Event:
    """A point in the order of launches.

    The host waits for it only if nothing was launched behind it: the device is busy otherwise.
    """

    record_of: Record
    refuse: Callable[[str], None]

    def record(self, stream: Stream | None = None) -> None:
        """Take the present point of a stream."""
        stream = current_stream() if stream is None else stream
        self.known = {**stream.known, stream.number: stream.time}
        self._started = self.record_of.started

    def synchronize(self) -> None:
        """Wait for what was launched before."""
        type(self).refuse("an event")
        _merge(host_known(), self.known)
        if self.record_of.started == self._started:
            self.record_of.note_wait("an event")


MAIN = Stream()
_local = threading.local()
_written: dict[int, tuple[int, int]] = {}


def _merge(known: dict[int, int], more: dict[int, int]) -> None:
    for number, time in more.items():
        known[number] = max(time, known.get(number, 0))


def host_known() -> dict[int, int]:
    """Return up to which time of each stream the present thread has waited."""
    if not hasattr(_local, "known"):
        _local.known = {}
    found: dict[int, int] = _local.known
    return found


def current_stream(device: Any = None) -> Stream:
    """Return the present stream of this thread."""
    stack = getattr(_local, "stack", None)
    return stack[-1] if stack else MAIN


class Inside:
    """Makes a stream the present one of this thread.

    Args:
        stream: The stream; ``None`` for the one that is present already.
        mode: Makes what lets operators of a thread run on the device.
    """

    def __init__(self, stream: Stream | None, mode: Callable[[], AbstractContextManager[Any]]):
        self._stream = current_stream() if stream is None else stream
        self._mode = None if threading.current_thread() is threading.main_thread() else mode()

    def __enter__(self) -> Stream:
        _local.stack = [*getattr(_local, "stack", []), self._stream]
        if self._mode is not None:
            self._mode.__enter__()
        return self._stream

    def __exit__(self, *error: Any) -> None:
        if self._mode is not None:
            self._mode.__exit__(*error)
        _local.stack = _local.stack[:-1]


def forget(tensor: Tensor) -> None:
    """Forget who wrote memory that is given to another tensor."""
    _written.pop(tensor.untyped_storage().data_ptr(), None)


def note(record: Record, name: str, read: Iterable[Tensor], written: Iterable[Tensor]) -> None:
    """Note an operator in the present stream, and its races.

    Args:
        record: What notes races.
        name: The operator.
        read: The tensors that it reads or changes, on the host.
        written: The tensors that it makes or changes.
    """
    stream = current_stream()
    here = stream.number
    for tensor in read:
        if tensor._is_zerotensor():  # of forward mode, without memory
            continue
        last = _written.get(tensor.untyped_storage().data_ptr())
        if last is None or last[0] == here:
            continue
        number, time = last
        if time > max(stream.known.get(number, 0), host_known().get(number, 0)):
            record.note_race(name)
    stream.time += 1
    for tensor in written:
        if not tensor._is_zerotensor():
            _written[tensor.untyped_storage().data_ptr()] = here, stream.time

"""Work of another thread on a GPU, in a stream beside that of the training loop."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class SideStream:
    """A stream beside the present one, for one piece of work; on other devices there is none.

    The device computes both at once. Events order them: the work begins when what was asked of the
    present stream before is done, and a stream that reads its results waits until it has ended. The
    host waits for neither.

    Args:
        device: The device.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._ended: torch.cuda.Event | None = None

    def follow_(self, operands: Iterable[Tensor]) -> None:
        """Let the work begin after what was asked of the present stream so far.

        Args:
            operands: What the work reads; its memory is not given away before that.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            for tensor in operands:
                tensor.record_stream(self._stream)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Ask for the work inside of the block, in any thread."""
        if self._stream is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            yield
            self._ended = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._ended.record(self._stream)

    def join_(self, results: Iterable[Tensor]) -> None:
        """Let the present stream wait for the work, which was asked for.

        Args:
            results: What it returned; its memory is not given away while the present stream reads.
        """
        if self._stream is None or self._ended is None:
            return
        present = torch.cuda.current_stream(self._stream.device)
        present.wait_event(self._ended)
        for tensor in results:
            tensor.record_stream(present)

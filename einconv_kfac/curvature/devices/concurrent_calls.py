"""Calls of functions for whose results the host waits, at once on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent import futures

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.side_stream import SideStream

MOST_THREADS = 16
"""Largest number of calls at once."""


def concurrent(
    function: Callable[..., tuple[Tensor, ...]], operands: Sequence[Sequence[Tensor]]
) -> list[tuple[Tensor, ...]]:
    """Return the results of a function for several operands.

    Some operations, as eigendecompositions, end when the host has read whether they have failed. On
    a GPU, threads call the function, each in a stream of its own: the device computes the results
    side by side, and the host waits once, for the longest call. Elsewhere the calls follow each
    other.

    Args:
        function: A function of tensors on one device.
        operands: The tensors of each call.
    """
    if not (len(operands) > 1 and all(own[0].is_cuda for own in operands)):
        return [function(*own) for own in operands]
    streams = [SideStream(own[0].device) for own in operands]
    for stream, own in zip(streams, operands):
        stream.follow_(own)
    with_gradients = torch.is_grad_enabled()

    def call(stream: SideStream, own: Sequence[Tensor]) -> tuple[Tensor, ...]:
        with torch.set_grad_enabled(with_gradients), stream.working():
            return function(*own)

    with futures.ThreadPoolExecutor(min(len(operands), MOST_THREADS), "kfac") as threads:
        calls = [threads.submit(call, *pair) for pair in zip(streams, operands)]
        futures.wait(calls)
    found = [each.result() for each in calls]
    for stream, results in zip(streams, found):
        stream.join_(results)
    return found

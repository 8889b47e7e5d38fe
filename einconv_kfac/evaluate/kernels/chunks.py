"""A batch in chunks of examples that fit into the processor's cache."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


def batch_slices(x: Tensor, example_bytes: int, chunk_bytes: int) -> Iterator[slice]:
    """Return slices of the batch dimension of ``x``, each of at least one example.

    Args:
        x: Tensor with the batch first; on an accelerator the batch is one chunk.
        example_bytes: Bytes of intermediate results per example.
        chunk_bytes: Largest number of bytes per chunk, if an example has no more.
    """
    size = len(x)
    if x.device.type == "cpu":
        size = chunk_bytes // example_bytes
    size = max(size, 1)
    return (slice(start, start + size) for start in range(0, len(x), size))

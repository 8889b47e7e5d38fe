"""Chunks of a batch: every example once, no empty chunk, no chunk above the bound."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.evaluate.kernels.chunks import batch_slices


@pytest.mark.parametrize("batch", [0, 1, 5, 6])
@pytest.mark.parametrize(("chunk_bytes", "largest"), [(1, 1), (100, 1), (299, 2), (1000, 10)])
def test_chunks_cover_the_batch(batch: int, chunk_bytes: int, largest: int) -> None:
    x = torch.arange(batch)
    chunks = [x[part] for part in batch_slices(x, 100, chunk_bytes)]
    assert torch.equal(torch.cat([x[:0], *chunks]), x)
    assert all(1 <= len(chunk) <= largest for chunk in chunks)


def test_an_accelerators_batch_is_one_chunk() -> None:
    assert list(batch_slices(torch.empty(7, device="meta"), 100, 1)) == [slice(0, 7)]

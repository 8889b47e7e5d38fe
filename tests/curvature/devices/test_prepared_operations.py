"""Operations that are prepared before they run."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from einconv_kfac.curvature.devices.operations import Scratch, flattened, run


def test_uses_share_memory() -> None:
    """Tensors of one use overlap, and those of others do not."""
    scratch, like = Scratch(), torch.empty(0, dtype=torch.float64)
    first, other = scratch.empty((2, 3), like, "a"), scratch.empty((2, 3), like, "b")
    smaller = scratch.empty((2, 2), like, "a")
    run([partial(first.fill_, 1.0), partial(other.fill_, 2.0), partial(smaller.fill_, 3.0)])
    assert first.flatten().tolist() == [3.0] * 4 + [1.0] * 2
    assert other.flatten().tolist() == [2.0] * 6
    assert first.dtype == torch.float64


def test_larger_use_leaves_earlier_tensors() -> None:
    """A use that needs more memory gets new one; tensors that were returned stay whole."""
    scratch, like = Scratch(), torch.empty(0)
    first = scratch.empty((2,), like, "a").fill_(1.0)
    scratch.empty((100,), like, "a").fill_(2.0)
    assert first.tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("index", "copies"),
    [
        ((slice(None),), 0),
        ((slice(1, 3),), 0),
        ((slice(1, 2), slice(0, 2)), 0),
        ((slice(None), slice(0, 2)), 1),
        ((slice(None), slice(None), slice(0, 2)), 1),
    ],
)
def test_flattened(index: tuple[slice, ...], copies: int) -> None:
    """Dimensions that do not follow each other in memory are copied when the operation runs."""
    x = torch.zeros(4, 3, 5, 2)
    found, operations = flattened(x[index], 0, 2, Scratch(), "box")
    assert len(operations) == copies
    x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(0)))
    run(operations)
    torch.testing.assert_close(found, x[index].flatten(0, 2), rtol=0, atol=0)

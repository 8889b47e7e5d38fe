"""A number for the bits of a tensor, by which changes of divided parameters are found."""

from __future__ import annotations

import pytest
import torch

from einconv_kfac.optim.replay.versions import digest

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_change_changes_the_digest(dtype: torch.dtype) -> None:
    """Also those that keep norm and sum."""
    torch.manual_seed(0)
    tensor = torch.randn(5, 7).to(dtype)
    known = digest(tensor)
    assert torch.equal(digest(tensor.clone()), known)
    assert torch.equal(digest(tensor.t().contiguous().t()), known)  # not of the strides
    changed = [-tensor, tensor.flip(0), tensor.roll(1, 1), torch.zeros_like(tensor)]
    swapped = tensor.clone()
    swapped[0, 0], swapped[4, 6] = tensor[4, 6], tensor[0, 0]
    for row in range(5):
        for column in range(7):
            changed.append(tensor.clone())
            changed[-1][row, column] *= 1.01
    for other in [*changed, swapped]:
        assert not torch.equal(digest(other), known)


def test_nothing_has_a_digest() -> None:
    assert torch.equal(digest(torch.zeros(0, 3)), digest(torch.zeros(0, 3)))

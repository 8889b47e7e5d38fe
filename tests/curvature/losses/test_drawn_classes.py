"""Classes drawn from a model's probabilities."""

from __future__ import annotations

import pytest
import torch
from torch import Generator

from einconv_kfac.curvature.losses.class_scores import drawn

TYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", TYPES)
def test_frequencies_are_the_probabilities(dtype: torch.dtype) -> None:
    """Each within six standard deviations, and independent between positions."""
    p = torch.tensor([0.5, 0.25, 0.2, 0.05, 0.0], dtype=dtype)
    n, positions = 20_000, 2
    rows = p.view(1, -1, 1).expand(n, -1, positions)
    onehot = drawn(rows, Generator().manual_seed(0))
    assert onehot.dtype == dtype
    assert onehot.shape == rows.shape
    assert torch.equal(onehot.sum(1), torch.ones(n, positions, dtype=dtype))
    assert not onehot[:, 4].any()
    joint = torch.einsum("na,nb->ab", onehot[..., 0], onehot[..., 1]) / n
    for found, expected in ((onehot.mean((0, 2)), p), (joint, torch.outer(p, p))):
        deviation = (expected * (1 - expected) / n).sqrt()
        assert bool(((found - expected).abs() <= 6 * deviation).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_values_that_are_no_probabilities_raise_nothing(value: float) -> None:
    """A GPU's assertion would end the process's use of it."""
    p = torch.full((3, 4), 0.25)
    p[1] = value
    onehot = drawn(p, Generator().manual_seed(0))
    assert torch.equal(onehot.sum(1), torch.ones(3))


def test_the_same_seed_draws_the_same() -> None:
    p = torch.full((5, 7, 2), 1 / 7)
    first, again, other = (drawn(p, Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert drawn(p[:0], Generator()).shape == (0, 7, 2)

"""Random vectors at the outputs of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from einconv_kfac.curvature.devices.sending import sent


def random_vectors(outputs: Sequence[Tensor], seed: int = 0) -> list[Tensor]:
    """Return random vectors at the outputs.

    Args:
        outputs: Tensors like the outputs, ``[n, ...]``.
        seed: The seed.
    """
    generator = Generator().manual_seed(seed)
    return [_drawn(o, generator) for o in outputs]


def _drawn(like: Tensor, generator: Generator) -> Tensor:
    """Return random numbers of the host like a tensor; the host does not wait for a GPU."""
    return sent(torch.randn(like.shape, generator=generator), like.device).to(like.dtype)

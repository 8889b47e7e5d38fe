"""Unfold and multiply, some examples at a time, on the upper block triangle only."""

from __future__ import annotations

from torch import Tensor

from einconv_kfac.curvature.factors.problem import Problem, chunks
from einconv_kfac.curvature.factors.unfold import unfolded
from einconv_kfac.curvature.factors.update import Update


def im2col(x: Tensor, problem: Problem, update: Update) -> None:
    """Add ``sum_{n,o} a a^T`` to the update, where ``a`` are the columns of the unfolded input."""
    geometry = problem.geometry
    growth = problem.entries * geometry.positions / max(1, x[0, 0].numel())
    for part in chunks(x, growth):
        update.add_product_(unfolded(part.to(update.out.dtype), geometry))
        update = update.added()
    update.mirror_()

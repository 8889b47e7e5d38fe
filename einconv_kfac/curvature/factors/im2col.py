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
    parts = list(chunks(x, growth))
    for part in parts:
        columns = unfolded(part.to(update.out.dtype), geometry)
        update.add_product_(columns, last=part is parts[-1])
        update = update.added()

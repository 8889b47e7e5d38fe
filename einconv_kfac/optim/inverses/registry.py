"""Decompositions of the factors of many layers at once, with recovery from failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from time import perf_counter
from typing import get_args

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.cholesky import (
    Pair,
    balanced,
    batched,
    inverses,
    not_positive_definite,
)
from einconv_kfac.curvature.blocks.eigen import EigenBlock, decomposed
from einconv_kfac.curvature.blocks.matrix_layout import Layout
from einconv_kfac.optim.inverses.protocol import (
    CorrectedInverse,
    EigenInverse,
    FactoredInverse,
    Inverse,
    LayerInverse,
)

RAISE = 10.0
"""Factor by which the damping of a layer is raised where its Cholesky decomposition fails."""
RAISES = 6
"""How often it is raised before that is an error."""


@dataclass(frozen=True)
class Task:
    """A layer's factors that are to be inverted.

    Args:
        name: The layer.
        factors: ``A [g, d, d]`` and ``B [g, co, co]``.
        damping: The damping.
        layout: The layer's parameters.
    """

    name: str
    factors: Pair
    damping: float
    layout: Layout

    @property
    def work(self) -> int:
        """The multiplications of its decompositions, up to a factor."""
        groups, rows, columns = self.layout.shape
        return groups * (rows**3 + columns**3)


@dataclass(frozen=True)
class Inverted:
    """An inverse, and what is known of how it was found.

    Args:
        inverse: The inverse.
        conditions: The condition numbers of ``A`` and ``B``, the largest of the groups: with
            ``"factored"`` of the damped factors, in the 1-norm; else of the factors as they
            are, in the 2-norm.
        retries: How often a decomposition was tried again.
        seconds: The layer's share of the time it took.
    """

    inverse: LayerInverse
    conditions: Tensor
    retries: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Kind:
    """A kind of inverse.

    Args:
        invert: Inverts the factors of layers.
        rebinds: Whether another damping needs no new decomposition.
        learns: Whether it needs gradients.
    """

    invert: Callable[[Sequence[Task]], list[Inverted]]
    rebinds: bool
    learns: bool = False

    def timed(self, tasks: Sequence[Task]) -> list[Inverted]:
        """Invert the factors of layers, each of which has a share of the time by its size.

        Raises:
            RuntimeError: If a damped factor is not positive definite.
        """
        start = perf_counter()
        results = self.invert(tasks)
        seconds = perf_counter() - start
        total = sum(task.work for task in tasks)
        return [
            replace(found, seconds=seconds * task.work / total)
            for task, found in zip(tasks, results)
        ]


def _factored(tasks: Sequence[Task]) -> list[Inverted]:
    """Return inverses with factored damping."""
    factors = [factor for task in tasks for factor in task.factors]
    dampings = [part for task in tasks for part in balanced(task.factors, task.damping)]
    found = inverses(factors, dampings)
    results = []
    for index, task in enumerate(tasks):
        own = slice(2 * index, 2 * index + 2)
        a, b = found[own]
        if a is None or b is None:
            results.append(_recovered(task))
            continue
        conditions = _conditions(task.factors, (dampings[own][0], dampings[own][1]), (a, b))
        results.append(Inverted(FactoredInverse(a, b, task.damping), conditions))
    return results


def _recovered(task: Task) -> Inverted:
    """Invert in float64, and with a larger damping if need be."""
    a, b = task.factors[0].double(), task.factors[1].double()
    for attempt in range(RAISES + 1):
        damping = task.damping * RAISE**attempt
        dampings = balanced((a, b), damping)
        left, right = inverses((a, b), dampings)
        if left is not None and right is not None:
            like = task.factors[0]
            conditions = _conditions((a, b), dampings, (left, right)).to(like)
            inverse = FactoredInverse(left.to(like), right.to(like), damping)
            return Inverted(inverse, conditions, attempt + 1)
    letter, part = ("A", dampings[0]) if left is None else ("B", dampings[1])
    raise not_positive_definite(f"{letter} of '{task.name}'", float(part.min()))


def _conditions(factors: Pair, dampings: Pair, inverted: Pair) -> Tensor:
    """Return the condition numbers of damped factors in the 1-norm, ``[2]``."""
    found = []
    for factor, damping, inverse in zip(factors, dampings, inverted):
        norm = torch.linalg.vector_norm(factor, 1, dim=-1).amax(-1) + damping
        found.append((norm * torch.linalg.vector_norm(inverse, 1, dim=-1).amax(-1)).amax())
    return torch.stack(found)


def _eigen(kind: type[EigenInverse]) -> Callable[[Sequence[Task]], list[Inverted]]:
    """Return what inverts by eigendecompositions."""

    def invert(tasks: Sequence[Task]) -> list[Inverted]:
        parts = batched(decomposed, [factor for task in tasks for factor in task.factors])
        results = []
        for task, (a, basis_a), (b, basis_b) in zip(tasks, parts[::2], parts[1::2]):
            block = EigenBlock(basis_a, basis_b, b[:, :, None] * a[:, None, :], task.layout)
            conditions = torch.stack([(v.amax(-1) / v.amin(-1)).amax() for v in (a, b)])
            results.append(Inverted(kind(block, task.damping), conditions))
        return results

    return invert


KINDS: dict[Inverse, Kind] = {
    "factored": Kind(_factored, rebinds=False),
    "exact": Kind(_eigen(EigenInverse), rebinds=True),
    "ekfac": Kind(_eigen(CorrectedInverse), rebinds=True, learns=True),
}


def kind_of(inverse: Inverse, fisher: str) -> Kind:
    """Return a kind of inverse.

    Raises:
        ValueError: If it is not one, or needs gradients that the Fisher does not have.
    """
    if inverse not in KINDS:
        raise ValueError(f"`inverse` must be one of {get_args(Inverse)}, got {inverse!r}.")
    if KINDS[inverse].learns and fisher == "forward-only":
        raise ValueError(
            f"`fisher` must have gradients for inverse={inverse!r}, got 'forward-only'. Pass "
            "another `fisher`, or inverse='exact'."
        )
    return KINDS[inverse]

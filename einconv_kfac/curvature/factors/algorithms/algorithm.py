"""An algorithm for input factors: whether it applies, what it costs, and how it adds a factor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.threads import Task
from einconv_kfac.curvature.factors.problem import Problem
from einconv_kfac.curvature.factors.symmetric.update import Update

BATCHED_MATRIX_CALLS = 0.004
"""Cost of one more matrix in a batched product, relative to a call with eight operations."""

SCATTERED_ELEMENT_COPIES = 3
"""Cost of copying or adding a single element, relative to one in a whole row."""


@dataclass(frozen=True)
class Cost:
    """The work of an algorithm, counted from shapes.

    Args:
        macs: Multiply-accumulates in matrix products.
        width: Rows and columns of these products.
        copied: Elements copied, masked or summed on the way to the products.
        written: Elements scattered on the way from the products.
        calls: Operations started.
        is_mixed: Whether inputs in a low precision are multiplied as they are, where the device
            does so.
        waits: Operations at whose end several threads wait for each other; all if ``None``.
    """

    macs: float
    width: float
    copied: float
    written: float
    calls: float
    is_mixed: bool = False
    waits: float | None = None

    def work_seconds(self, problem: Problem) -> float:
        """Return an estimate of its time on one thread without the calls."""
        prices = problem.profile.prices
        slow = 1 + prices.half_speed_width / self.width
        double = 2.0 if problem.dtype == torch.float64 else 1.0
        rate = problem.mixed_price() if self.is_mixed else problem.tf32_price()
        return (
            prices.mac * self.macs * rate * slow
            + prices.copied * self.copied
            + prices.written * self.written
        ) * double


class Algorithm(ABC):
    """A way to compute ``sum_{n,o} a a^T`` from the input of a convolution.

    A concrete subclass in a file of ``algorithms/`` is one of the algorithms to choose from.
    """

    name: ClassVar[str]
    """The name that ``algorithm=`` takes."""

    rank: ClassVar[int]
    """The position in the order of algorithms; the first of equally cheap ones is chosen."""

    is_always_fastest: ClassVar[bool] = False
    """Whether it is chosen wherever it applies, whatever the costs."""

    is_measured: ClassVar[bool] = True
    """Whether it may be chosen by its cost; others are computed where their name is given."""

    reads_unmet: ClassVar[bool] = False
    """Whether positions that no kernel entry meets enter products with zeros."""

    def applies(self, problem: Problem) -> bool:
        """Return whether the algorithm can compute the factor of a problem on its device."""
        return True

    @abstractmethod
    def cost(self, problem: Problem) -> Cost:
        """Return the work of `add`."""

    @abstractmethod
    def add(self, x: Tensor, problem: Problem, update: Update) -> None:
        """Add ``sum_{n,o} a a^T`` to an update.

        Args:
            x: Input of shape ``[n, c, *i]``.
            problem: The problem that ``x`` and the convolution pose.
            update: The update of ``[g, D, D]`` with the problem's groups and size.
        """

    def sharing(self, problem: Problem) -> float:
        """Return how many threads of a problem share its operations about evenly."""
        return problem.threads

    def task(self, x: Tensor, problem: Problem, update: Update) -> Task:
        """Return `add` as a task; what only needs shapes may be prepared before it runs."""
        return partial(self.add, x, problem, update)

    def shares(self, problem: Problem, tasks: int) -> list[float]:
        """Return the parts of the work of tasks into which `phases` divides it, if it does.

        Args:
            problem: The problem.
            tasks: Number of tasks.
        """
        return [1.0]

    def phases(self, x: Tensor, problem: Problem, update: Update) -> Iterator[list[Task]]:
        """Yield tasks that may run at the same time; each phase starts when the last has ended.

        Args:
            x: As in `add`.
            problem: The problem, with its number of shares.
            update: As in `add`.
        """
        yield [self.task(x, problem, update)]

"""Which of several workers has the running factors of which layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.arguments import flag
from einconv_kfac.curvature.blocks.cholesky import Pair
from einconv_kfac.distributed.workers import Workers
from einconv_kfac.optim.arguments import communication_dtype_of
from einconv_kfac.optim.factors.running import RunningFactors, names_with_factors


@dataclass(frozen=True)
class Sharing:
    """How several workers share factors.

    Args:
        divide_factors: Whether each layer's factors are on one worker only.
        communication_dtype: The data type in which factors are sent; their own for ``None``.
    """

    divide_factors: bool = False
    communication_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        flag("divide_factors", self.divide_factors)
        communication_dtype_of(self.communication_dtype)


DEFAULT_SHARING = Sharing()


class Ownership:
    """Factors that are each on one worker, which inverts them, or that are on all workers.

    A layer keeps its owner. So that all workers have about as much to invert, the largest layers
    are assigned first, each to who has least work.

    Args:
        workers: The workers.
        is_wanted: Whether factors are divided where there are several workers.

    Attributes:
        owners: The workers by layer; empty where all workers have all factors.
    """

    def __init__(self, workers: Workers, *, is_wanted: bool) -> None:
        self.owners: dict[str, int] = {}
        self.is_wanted = is_wanted
        self._workers = workers
        self._is_divided = is_wanted and workers.size > 1
        self._loads = [0.0] * workers.size

    @staticmethod
    def of(workers: Workers, divide_factors: bool, in_background: bool) -> Ownership:
        """Return what arguments of an optimizer ask for.

        Raises:
            ValueError: If threads invert, which need all factors.
        """
        if divide_factors and in_background:
            raise ValueError(
                "`divide_factors` must be False where inverse_in_background=True, got True: the "
                "thread of each worker inverts all factors. Leave one of them out."
            )
        return Ownership(workers, is_wanted=divide_factors)

    def assign_(self, layers: Mapping[str, RunningFactors]) -> None:
        """Assign layers that have no owner; all workers call it with the same layers."""
        if not self._is_divided:
            return
        costs = {name: own.work for name, own in layers.items() if name not in self.owners}
        for name, rank in zip(costs, self._workers.assigned([*costs.values()], self._loads)):
            self.owners[name] = rank
            self._loads[rank] += costs[name]
        for name, own in layers.items():
            own.is_owned = self.owners[name] == self._workers.rank

    def total(self, own: Tensor) -> Tensor:
        """Return a sum over all layers, given that over the layers whose factors are at hand."""
        if not self._is_divided:
            return own
        (mean,) = self._workers.means([own], "sum over layers")
        found: Tensor = mean * self._workers.size
        return found

    def states(self, layers: Mapping[str, RunningFactors]) -> dict[str, Any]:
        """Return the whole states of layers; all workers call it where factors are divided."""
        factors = self._gathered(layers) if self._is_divided else {}
        return {name: own.state_dict(factors.get(name)) for name, own in layers.items()}

    def _gathered(self, layers: Mapping[str, RunningFactors]) -> dict[str, Pair]:
        """Return the factors of all layers that have some."""
        names = sorted(names_with_factors(layers))
        known = [(index, layers[name].factors) for index, name in enumerate(names)]
        found = {index: factors for index, factors in known if factors is not None}
        with self._workers.together():
            self._workers.means([], "the factors of a state")
            shared = self._workers.shared(found, tuple, lambda _, sent: (sent[0], sent[1]))
        return {name: shared[index] for index, name in enumerate(names)}

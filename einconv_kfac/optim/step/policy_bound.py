"""A bound on the change of a policy by a step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.agreement import Agreement
from einconv_kfac.optim.step.fits.slope_trust import SlopeTrust
from einconv_kfac.optim.step.in_place import add_
from einconv_kfac.optim.step.momentum.slow_momentum import SlowMomentum
from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.reading import read
from einconv_kfac.optim.step.rollback import last_update
from einconv_kfac.optim.vectors import Direction, sum_of

LARGEST_DIVERGENCE = 0.01
"""Bound on the mean Kullback-Leibler divergence of a policy after a step from that before it."""
ATTEMPTS = 16
"""Maximum number of attempts to shorten a step; after the last one it is taken back."""
MARGIN = 0.9
"""Fraction of the length at which a divergence that is quadratic would meet the bound."""
SMALLEST_FACTOR = 0.1
"""Smallest factor by which a step is shortened in one attempt."""


@dataclass(frozen=True)
class PolicyBound:
    """Shortens steps that change a policy by much.

    A policy gradient is no objective: its cross entropies with negative weights have no minimum,
    and it says nothing of rewards under another policy than that of its samples. Where a policy is
    certain, its curvature vanishes, and a few rare samples lead far away from a policy that was
    good. So the mean divergence of the policy before a step from that after it is bounded, as in
    the trust regions of Schulman et al. (2015) and Wu et al. (2017). It is evaluated, with the part
    of the slow momentum, which takes a forward pass. The slow momentum is shortened with the step,
    as it would lead on as far.

    Several workers evaluate nothing.

    Args:
        replay: Runs the model again.
        trust: The trust in slopes.
        agreement: Whether batches agree.
        slow: The slow momentum.
    """

    replay: Replay
    trust: SlopeTrust
    agreement: Agreement
    slow: SlowMomentum

    def bound_(self, objective: Objective) -> None:
        """Shorten the last step, if it changes a policy by too much.

        Args:
            objective: The objective; its parameters are those after the step.
        """
        batches = [b for b in objective.batches if b.loss_model and b.loss_model.has_policies]
        if not batches or objective.workers.size > 1:
            return
        update = last_update(objective.memory)
        if update and (left := self._shorten_(objective, update, batches)) < 1:
            self.trust.shorten_(left)
            self.agreement.drop_()
            self.slow.shorten_(objective.memory, left)

    def _shorten_(self, objective: Objective, update: Direction, batches: Sequence[Batch]) -> float:
        """Shorten a step until the policy changes little, and return the fraction that is left."""
        own, steps, left = [objective.parameters[name] for name in update], [*update.values()], 1.0
        for attempt in range(ATTEMPTS):
            divergence = self._divergence(batches)
            if divergence <= LARGEST_DIVERGENCE:
                return left
            factor = max(MARGIN * math.sqrt(LARGEST_DIVERGENCE / divergence), SMALLEST_FACTOR)
            factor = factor if attempt + 1 < ATTEMPTS else 0.0
            add_(own, steps, factor - 1)
            torch._foreach_mul_(steps, factor)
            left *= factor
        return left

    def _divergence(self, batches: Sequence[Batch]) -> float:
        """Return the mean divergence of the policies at the present parameters."""
        found: list[Tensor] = []
        for batch in batches:
            assert batch.loss_model is not None
            found.append(batch.loss_model.divergence(self.replay.outputs(batch)))
        ((total, count),) = read(sum_of(found))
        mean = total / count if count else 0.0
        return mean if math.isfinite(mean) else math.inf

"""The damping of a step: the given one or that of a rule, and more of it after a failure."""

from __future__ import annotations

from typing import cast

from einconv_kfac.curvature.arguments import MULTIPLIER_END, in_range
from einconv_kfac.optim.replay.replay import Replay
from einconv_kfac.optim.step.damping.first_curvature import FirstCurvature
from einconv_kfac.optim.step.damping.rule import DampingRule
from einconv_kfac.optim.step.objective import Objective

RELAXATION = 19 / 20
"""Factor per step by which a given damping returns to what was given."""
LARGEST_FACTOR = 1e12
"""Largest factor of a given damping."""


class DampingSource:
    """Returns the damping of each step.

    A given damping is used as given. After a step that was undone, or skipped, the same damping
    could lead to the same step for ever. It is therefore multiplied by a factor that falls back
    to 1 in the steps that follow.

    Args:
        rule: The damping rule.
        replay: Runs the model again.

    Attributes:
        factor: The factor of a given damping, at least 1.
        first: The first damping of the rule.
    """

    def __init__(self, rule: DampingRule, replay: Replay) -> None:
        self._rule = rule
        self._replay = replay
        self.factor = 1.0
        self.first: float | None = None

    def damping_(self, objective: Objective, step: int) -> float | None:
        """Return the damping; ``None`` as long as every gradient was zero and none is given."""
        if (given := objective.settings.damping) is not None:
            return cast("float", given) * self.factor
        damping = self._of_rule(step)
        if damping is None:
            curvature = FirstCurvature(self._replay, objective)
            return self.first_(curvature, float(objective.value()), step)
        return damping

    def first_(self, curvature: FirstCurvature, value: float, step: int) -> float | None:
        """Set the first damping, and return it; ``None`` if every gradient is zero.

        Args:
            curvature: The curvature along the first gradient.
            value: The objective.
            step: The number of steps taken.
        """
        found = curvature.read(value)
        if found is None:
            return None
        self._rule.initial(found)
        self.first = damping = self._of_rule(step)
        assert damping is not None
        return damping

    def _of_rule(self, step: int) -> float | None:
        """Return the damping of the rule.

        Raises:
            ValueError: If it is neither a positive number nor ``None``.
        """
        found = self._rule.damping(step)
        return (
            None
            if found is None
            else in_range("damping", found, below=MULTIPLIER_END, positive=True)
        )

    def is_known(self, objective: Objective, step: int) -> bool:
        """Return whether a damping is given, or known to the rule."""
        return objective.settings.damping is not None or self._rule.damping(step) is not None

    def is_sufficient(self, step: int) -> bool:
        """Return whether the damping of the rule is at least the first one.

        A larger one turns steps towards the gradient, and makes all of them short for the sake of
        the layers along which the model is worst.
        """
        found = self._rule.damping(step)
        return not (found is None or self.first is None) and found >= self.first

    def raise_(self, factor: float) -> None:
        """Raise the damping by a factor after a step that failed."""
        self._rule.after_rejection(factor)
        self.factor = min(self.factor * factor, LARGEST_FACTOR)

    def relax_(self) -> None:
        """Let a given damping return to what was given, after a step that did not fail."""
        self.factor = max(1.0, self.factor * RELAXATION)

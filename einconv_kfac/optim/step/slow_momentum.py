"""A slow momentum, so that steps are long where batches agree and noise is averaged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einconv_kfac.optim.step.layer_gains import Gains
from einconv_kfac.optim.step.objective import Memory, Objective
from einconv_kfac.optim.vectors import Direction, layer_of

BUFFER = "slow_momentum"

WINDOW = 5
"""It is followed over the latest fraction ``1 / WINDOW`` of the steps, or so."""


class SlowMomentum:
    """A sum of steps that decays with ``1 - c``, and of which parameters follow ``c`` a step.

    The minimum ``u`` of the quadratic model of one batch is made of the noise in its gradient as
    much as of what other batches share. Parameters take the fraction ``s`` of it at once that
    other batches confirm (the signal), and what is left of ``gain`` times ``u`` later::

        parameters += s u + c m,   m <- (1 - c) (m + (gain - s) u),   c = WINDOW / (t + WINDOW)

    for step ``t = 0, 1, ..``. What the last ``t / WINDOW`` batches agree on is thereby followed
    ``gain`` times as far as ``u``, of which no batch's noise has more than a small part. It is
    a second momentum as in AdEMAMix (Pagliardini et al., 2024), whose memory grows with time as
    that of the averages of Shamir and Zhang (2013), so that noise dies down without a schedule.
    Each layer has a gain of its own (`Gains`).
    """

    def __init__(self) -> None:
        self.steps = 0
        self.gains = Gains()

    @property
    def weight(self) -> float:
        """The coefficient ``c`` of the next step."""
        return WINDOW / (self.steps + WINDOW)

    def direction(self, memory: Memory, rates: Mapping[str, float]) -> Direction:
        """Return what ``c`` of is followed next: ``m`` times the learning rates.

        Args:
            memory: Where ``m`` is kept, by parameter name.
            rates: Learning rates, by parameter name.
        """
        known = {name: state[BUFFER] for name, state in memory.items() if BUFFER in state}
        return {n: m if rates[n] == 1 else m * rates[n] for n, m in known.items()}

    def follow_(
        self, objective: Objective, update: Direction, memory: Memory, signal: float
    ) -> float:
        """Move on; parameters whose learning rate is zero stay where they are.

        Args:
            objective: The objective; ``update`` has been added to its parameters.
            update: The step ``s u`` on the batch; what is followed is added to it.
            memory: Where ``m`` is kept, by parameter name.
            signal: ``s``.

        Returns:
            The coefficient ``c``.
        """
        weight = self.weight
        momentum = self.direction(memory, objective.rates)
        self.gains.learn_(objective, momentum, update, weight, signal)
        self.steps += 1
        for name, tensor in update.items():
            rate = objective.rates[name]
            if not rate:
                continue
            gain = self.gains.later(layer_of(name), signal)
            later = tensor * ((1 - weight) * gain / (signal * rate))
            if (followed := memory[name].get(BUFFER)) is None:
                memory[name][BUFFER] = later
                continue
            tensor.add_(followed, alpha=weight * rate)
            objective.parameters[name].add_(followed, alpha=weight * rate)
            followed.mul_(1 - weight).add_(later)
        return weight

    def drop_(self, memory: Memory) -> None:
        """Drop the momentum, which led too far, and what was learned of it."""
        for state in memory.values():
            state.pop(BUFFER, None)
        self.gains = Gains()

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers; the momentum itself is the optimizer's."""
        return {"steps": self.steps, "gains": self.gains.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.steps = state["steps"]
        self.gains.load_state_dict(state["gains"])

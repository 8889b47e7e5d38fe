"""A slow momentum: long steps along what batches share, and averaged noise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from einconv_kfac.optim.state_schema import COUNT, FINITE, Listed, Maybe, Record
from einconv_kfac.optim.step.in_place import add_
from einconv_kfac.optim.step.momentum.layer_gains import LayerGains
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts, layer_products
from einconv_kfac.optim.step.objective import Memory, Objective
from einconv_kfac.optim.vectors import Direction, layer_of, scaled

BUFFER = "slow_momentum"

WINDOW = 5
"""The momentum decays over about the latest fraction ``1 / WINDOW`` of the steps."""
RESTART_PERIOD = 10
"""Steps between two looks at the objective of a batch that repeats."""


class SlowMomentum:
    """A sum of steps that decays with ``1 - c``, of which ``c`` is added to each step.

    The minimum ``u`` of the quadratic model of one batch consists of the noise in its gradient
    as much as of the part that batches share. The parameters take the fraction ``s`` of ``u`` at
    once that other batches confirm (the trust), and the rest of ``gain`` times ``u`` later::

        parameters += s u + c m,   m <- (1 - c) (m + (gain - s) u),   c = WINDOW / (t + WINDOW)

    for step ``t = 0, 1, ..``. The part that the last ``t / WINDOW`` batches share is thereby
    multiplied by ``gain``, while no batch's noise has more than a small share. This is
    a second momentum as in AdEMAMix (Pagliardini et al., 2024), whose memory grows with time as
    that of the averages of Shamir and Zhang (2013), so that noise decays without a schedule.
    Each layer has a gain of its own (`LayerGains`).

    Where batches repeat, the momentum accelerates instead, and can lead too far for many steps in
    directions of large curvature. There it restarts when the objective has grown (the function
    scheme of O'Donoghue and Candès, 2015), over a period, since it may well grow for a few steps.
    """

    def __init__(self) -> None:
        self.steps = 0
        self.gains = LayerGains()
        self._seen: tuple[float, int] | None = None  # an objective, and the steps before it

    @property
    def weight(self) -> float:
        """The coefficient ``c`` of the next step."""
        return WINDOW / (self.steps + WINDOW)

    def direction(self, memory: Memory, rates: Mapping[str, float]) -> Direction:
        """Return the direction of which ``c`` is added next: ``m`` times the learning rates.

        Args:
            memory: The optimizer's state, which keeps ``m``, by parameter name.
            rates: Learning rates, by parameter name.
        """
        known = {name: state[BUFFER] for name, state in memory.items() if BUFFER in state}
        return known if all(rates[name] == 1 for name in known) else scaled(known, rates)

    def add_(
        self,
        objective: Objective,
        update: Direction,
        trust: float,
        products: Mapping[str, LayerProducts] | None = None,
    ) -> float:
        """Add the momentum to a step; parameters whose learning rate is zero stay.

        Args:
            objective: The objective; ``update`` was added to its parameters.
            update: The step ``s u`` on the batch; the momentum's part is added to it.
            trust: ``s``.
            products: The inner products by layer, of parameters whose learning rate is not zero;
                they are computed if they are not given.

        Returns:
            The coefficient ``c``.
        """
        weight, rates = self.weight, objective.rates
        momentum = self.direction(objective.memory, rates)
        trained = {name: tensor for name, tensor in update.items() if rates[name]}
        if products is None:
            point = objective.parameters, objective.gradient
            products = layer_products(point, momentum, trained)
        remainders = self.gains.adapt_(products, weight, trust)
        self.steps += 1
        if not trained:
            return weight
        shares = [
            (1 - weight) * remainders[layer] / (trust * rates[name])
            for name, layer in zip(trained, map(layer_of, trained))
        ]
        later = dict(zip(trained, torch._foreach_mul([*trained.values()], shares)))
        if known := [name for name in trained if name in momentum]:
            buffers = [objective.memory[name][BUFFER] for name in known]
            torch._foreach_add_([later[name] for name in known], buffers, alpha=1 - weight)
            followed = [momentum[name] for name in known]
            torch._foreach_add_([update[name] for name in known], followed, alpha=weight)
            moved = [objective.parameters[name] for name in known]
            add_(moved, followed, weight)
        for name, tensor in later.items():
            objective.memory[name][BUFFER] = tensor
        return weight

    def keep_(
        self,
        memory: Memory,
        later: Direction,
        products: Mapping[str, LayerProducts],
        trust: float,
    ) -> float:
        """Take over a momentum that was computed before the host has read the products.

        Args:
            memory: The optimizer's state.
            later: The momentum.
            products: The inner products by layer; gains must be as expected of them.
            trust: ``s``.

        Returns:
            The coefficient ``c`` of the momentum before.
        """
        weight = self.weight
        self.gains.adapt_(products, weight, trust)
        self.steps += 1
        for name, tensor in later.items():
            memory[name][BUFFER] = tensor
        return weight

    def restart_(self, memory: Memory, value: float, *, repeats: bool) -> None:
        """Drop the momentum where a batch repeats and its objective has grown over a period.

        Args:
            memory: The optimizer's state.
            value: The objective before the step.
            repeats: Whether the batch repeats.
        """
        known, steps = self._seen or (value, self.steps)
        if not repeats:
            self._seen = None
        elif self._seen is None or self.steps - steps >= RESTART_PERIOD:
            if value > known:
                self.drop_(memory)
            self._seen = value, self.steps

    def shorten_(self, memory: Memory, fraction: float) -> None:
        """Shorten a momentum to a fraction."""
        for state in memory.values():
            if BUFFER in state:
                state[BUFFER] = state[BUFFER] * fraction

    def drop_(self, memory: Memory) -> None:
        """Drop a momentum that led too far, and the gains."""
        for state in memory.values():
            state.pop(BUFFER, None)
        self.gains, self._seen = LayerGains(), None

    schema = Record({"steps": COUNT, "gains": LayerGains.schema, "seen": Maybe(Listed(FINITE, 2))})

    def state_dict(self) -> dict[str, Any]:
        """Return the state as numbers; the momentum itself is part of the optimizer's state."""
        seen = self._seen and [*self._seen]
        return {"steps": self.steps, "gains": self.gains.state_dict(), "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.steps = state["steps"]
        self.gains.load_state_dict(state["gains"])
        self._seen = state["seen"] and (state["seen"][0], int(state["seen"][1]))

"""The slow momentum, added to a step unless the objective grows by it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from einconv_kfac.optim.step.comparison.reduction import Before, Compared, Reduction
from einconv_kfac.optim.step.in_place import copy_
from einconv_kfac.optim.step.momentum.layer_products import LayerProducts
from einconv_kfac.optim.step.momentum.slow_momentum import BUFFER, SlowMomentum
from einconv_kfac.optim.step.objective import Objective, is_late
from einconv_kfac.optim.step.reading import Unread
from einconv_kfac.optim.vectors import Direction


@dataclass(frozen=True)
class MomentumAhead:
    """The slow momentum, added before the host has read whether the step itself is good.

    Args:
        coefficient: Its coefficient.
        is_good: Whether the objective has not grown by both.
        update: The step without it.
        undo_: Restores everything as it was without it.
    """

    coefficient: float
    is_good: Unread
    update: Direction
    undo_: Callable[[], None]


@dataclass(frozen=True)
class GuardedMomentum:
    """Adds the slow momentum to steps.

    Args:
        slow: The slow momentum.
        reduction: Evaluates the objective.
        safeguard: Whether the momentum is dropped if the objective has grown on its own batch.
    """

    slow: SlowMomentum
    reduction: Reduction
    safeguard: bool

    def add_(
        self,
        objective: Objective,
        update: Direction,
        before: Before | None,
        trust: float,
        products: Mapping[str, LayerProducts] | None,
    ) -> float:
        """Add the slow momentum to a step, and return its coefficient.

        Args:
            objective: The objective; its parameters are those after the step on the batch.
            update: That step; the momentum's part is added to it.
            before: The objective before the step.
            trust: The trust in slopes.
            products: The step's inner products by layer, if they are known.
        """
        known = products if all(objective.rates.values()) else None
        own = {name: tensor.clone() for name, tensor in update.items() if self.safeguard}
        coefficient = self.slow.add_(objective, update, trust, known)
        if before is None or not self.safeguard:
            return coefficient
        if bool(self.reduction.value(objective) <= before.allowed()):
            return coefficient
        return self._dropped_(objective, update, own)

    def adapt_(
        self, objective: Objective, update: Direction, before: Before, at: Compared, trust: float
    ) -> tuple[float, float | None]:
        """Compare a step, as `Reduction.adapt_`, and on a GPU add the momentum meanwhile.

        Where the host has to decide about both, the device is asked for the objective with the
        momentum before the host has read whether the step itself is good.

        Args:
            objective: The objective; its parameters are those after the step on the batch.
            update: That step; it is shortened, and the momentum's part is added to it.
            before: The objective before the step.
            at: The step as the model sees it.
            trust: The trust in slopes.

        Returns:
            The fraction of the step that is left, and the coefficient of the momentum, ``None``
            where it is still to be added.
        """
        asked = self.reduction.asked(objective, before, at.predicted)
        if asked is None:
            return 1.0, None
        unread = Unread(asked)
        ahead = self._ahead_(objective, update, before, at.products, trust)
        (numbers,) = unread.read()
        is_whole = numbers[0] <= numbers[-1]
        if ahead is not None and not is_whole:
            ahead.undo_()
        left = self.reduction.adapt_(objective, update, before, at, numbers)
        if ahead is None or not is_whole:
            return left, None
        own = ahead.update
        is_good = ahead.is_good.read()[0][0]
        return left, ahead.coefficient if is_good else self._dropped_(objective, update, own)

    def _ahead_(
        self,
        objective: Objective,
        update: Direction,
        before: Before,
        products: Mapping[str, LayerProducts] | None,
        trust: float,
    ) -> MomentumAhead | None:
        """Add the momentum before the host has read whether the step is good, where that helps."""
        is_known = products is not None and all(objective.rates.values())
        if not (self.safeguard and is_known and is_late(objective)):
            return None
        targets = [*(objective.parameters[name] for name in update), *update.values()]
        kept, state = [tensor.clone() for tensor in targets], self.slow.state_dict()
        buffers = {name: own.get(BUFFER) for name, own in objective.memory.items()}
        coefficient = self.slow.add_(objective, update, trust, products)

        def undo_() -> None:
            copy_(targets, kept)
            self.slow.load_state_dict(state)
            for name, own in objective.memory.items():
                own.pop(BUFFER, None)
                if (buffer := buffers[name]) is not None:
                    own[BUFFER] = buffer

        is_good = Unread(self.reduction.value(objective) <= before.allowed())
        own = dict(zip(update, kept[len(update) :]))
        return MomentumAhead(coefficient, is_good, own, undo_)

    def _dropped_(self, objective: Objective, update: Direction, own: Direction) -> float:
        """Drop a momentum that was added, and return the coefficient of none.

        Args:
            objective: The objective.
            update: The step with the momentum.
            own: The step without it.
        """
        for name, tensor in own.items():
            objective.parameters[name].add_(tensor - update[name])
            update[name].copy_(tensor)
        self.slow.drop_(objective.memory)
        return 0.0

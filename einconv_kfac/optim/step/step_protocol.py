"""What a step is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor

from einconv_kfac.optim.step.objective import Objective
from einconv_kfac.optim.step.parameter_change import ParameterChange

Statistics: TypeAlias = Mapping[str, float | Tensor]
"""Numbers of a step by name; a tensor is a number on the device that was not read yet."""
Moved: TypeAlias = Mapping[str, tuple[Tensor, float]]
"""The update of each parameter, as a tensor and a factor, by name."""


@dataclass(frozen=True)
class Taken:
    """A step that was taken.

    Args:
        statistics: Numbers of the whole model.
        moved: The update.
        gains: Gain of the slow momentum by layer, if there is one.
        changes: What is left to do to the parameters.
    """

    statistics: Statistics
    moved: Moved = field(default_factory=dict)
    gains: Mapping[str, float] = field(default_factory=dict)
    changes: Sequence[ParameterChange] = ()


class Step(Protocol):
    """Turns an objective into an update of the parameters."""

    mode: str
    """Name of the kind of step, which a saved state must share."""
    moves_parameters: bool
    """Whether `take_` changes the parameters itself; if not, it returns the changes."""

    def check(self, objective: Objective) -> None:
        """Raise a ``RuntimeError`` if a step on the objective is impossible."""

    def take_(self, objective: Objective) -> Taken:
        """Update the parameters, or return how they are to be updated.

        Raises:
            RuntimeError: If the damped factors cannot be inverted. Nothing is changed then.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return the state as tensors and numbers."""

    def check_state(self, state: Any, parameters: Mapping[str, Tensor]) -> None:
        """Raise a ``ValueError`` if a state is not one of this kind of step.

        Args:
            state: The state.
            parameters: The parameters by name.
        """

    def snapshot(self, parameters: Mapping[str, Tensor]) -> Callable[[], None]:
        """Return a function that restores the present state.

        Args:
            parameters: The parameters by name.
        """

    def load_state_dict(self, state: dict[str, Any], parameters: Mapping[str, Tensor]) -> None:
        """Take over a state; tensors are copied to the device of the parameters."""

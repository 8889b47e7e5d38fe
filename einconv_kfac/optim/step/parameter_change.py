"""The change of the parameters that ends a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

from torch import Tensor

from einconv_kfac.optim.step.in_place import add_, copy_

Operation: TypeAlias = Callable[[list[Tensor], list[Tensor]], None]


@dataclass(frozen=True)
class ParameterChange:
    """New values of parameters, or what is added to them: computed, and not yet applied.

    The versions of the parameters tell which of them have changed since.

    Args:
        operation: Changes the first tensors by the others, in place.
        parameters: The parameters.
        operands: A tensor for each.
        versions: The versions of the parameters before the change.
    """

    operation: Operation
    parameters: list[Tensor]
    operands: list[Tensor]
    versions: Sequence[int]

    @staticmethod
    def adding(parameters: list[Tensor], operands: list[Tensor], factor: float) -> ParameterChange:
        """Return the addition of multiples of tensors."""
        versions = [parameter._version for parameter in parameters]
        operation = partial(add_, alpha=factor)
        return ParameterChange(operation, parameters, operands, versions)

    @staticmethod
    def replacing(parameters: list[Tensor], values: list[Tensor]) -> ParameterChange:
        """Return the assignment of values."""
        versions = [parameter._version for parameter in parameters]
        return ParameterChange(copy_, parameters, values, versions)

    def apply_(self) -> None:
        """Change the parameters."""
        self.operation(self.parameters, self.operands)

    @property
    def has_begun(self) -> bool:
        """Whether a parameter has changed."""
        return len(self._left()) < len(self.parameters)

    def finish_(self) -> None:
        """Change the parameters that have not changed yet."""
        if left := self._left():
            own = [self.parameters[index] for index in left]
            self.operation(own, [self.operands[index] for index in left])

    def _left(self) -> list[int]:
        """Return which parameters have not changed yet."""
        known = zip(self.parameters, self.versions)
        return [index for index, (own, version) in enumerate(known) if own._version == version]

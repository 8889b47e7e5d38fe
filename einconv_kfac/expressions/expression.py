"""Einsum expressions: networks with an equation and the tensors of a call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from einconv_kfac.expressions.constants import constant, scalar
from einconv_kfac.expressions.views import stepped
from einconv_kfac.network import Leaf, Network, Shape
from einconv_kfac.network.equation import equation

Bound = tuple[str, list[Tensor], Shape]


@dataclass(frozen=True)
class Expression:
    """A network, simplified or not, whose result needs only a reshape."""

    network: Network

    @cached_property
    def equation(self) -> str:
        """Equation for ``torch.einsum``."""
        operands = [node.indices for node in self.network.nodes]
        return equation([*operands, ()] if self._scaled else operands, self.network.output)

    @property
    def _scaled(self) -> bool:
        """Whether the scale is an operand: it is not one, or no other operand is left."""
        return self.network.scale != 1 or not self.network.nodes

    def bind(self, *tensors: Tensor) -> Bound:
        """Return equation, operands, and the shape of the result."""
        operands = []
        device, dtype = tensors[0].device, tensors[0].dtype
        for node in self.network.nodes:
            operand = node.operand
            if isinstance(operand, Leaf):
                operands.append(stepped(tensors[operand.slot], operand.steps))
            else:
                operands.append(constant(operand, device, dtype))
        if self._scaled:
            operands.append(scalar(self.network.scale, tensors[0]))
        return self.equation, operands, self.network.shape

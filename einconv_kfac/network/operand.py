"""What a tensor network is made of: leaves, index patterns and Kronecker deltas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from einconv_kfac.geometry import Axis
from einconv_kfac.network.step import VIEWS, Narrow, Shape, Step, reshaped

ROLES = ("k", "o", "i")
"""The indices of an index pattern: kernel, output and input position."""


@dataclass(frozen=True)
class Leaf:
    """A tensor that the caller provides, and the steps that bring it into shape.

    Args:
        name: What the tensor is called in pictures and printed equations.
        slot: Its position among the caller's tensors.
        source: The shape in which the caller provides it.
        steps: What is done to it before the contraction.
    """

    name: str
    slot: int
    source: Shape
    steps: tuple[Step, ...] = ()

    @cached_property
    def shape(self) -> Shape:
        """Shape of the operand in the contraction."""
        return reshaped(self.source, self.steps)

    def then(self, *steps: Step) -> Leaf:
        """Return the leaf with more steps; a view that undoes the last one cancels it."""
        done = list(self.steps)
        for step in steps:
            shape = reshaped(self.source, done)
            after = step.reshape(shape)
            if isinstance(step, Narrow) and after == shape:
                continue
            undoes = isinstance(step, VIEWS) and done and isinstance(done[-1], VIEWS)
            if undoes and after == reshaped(self.source, done[:-1]):
                done.pop()
            else:
                done.append(step)
        return replace(self, steps=tuple(done))


@dataclass(frozen=True)
class Pattern:
    """The index pattern ``P[k, o, i]`` of one axis, with the roles in ``summed`` summed out."""

    axis: Axis
    summed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What the operand is called in pictures and printed equations."""
        return "P"

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the remaining indices, in order."""
        return tuple(role for role in ROLES if role not in self.summed)

    @cached_property
    def shape(self) -> Shape:
        """Shape of the operand in the contraction."""
        axis = self.axis
        sizes = {"k": axis.kernel_size, "o": axis.output_size, "i": axis.input_size}
        return tuple(sizes[role] for role in self.roles)

    def sum(self, role: str) -> Pattern:
        """Return the pattern with one more role summed out."""
        return replace(self, summed=tuple(r for r in ROLES if r in self.summed or r == role))


@dataclass(frozen=True)
class Delta:
    """The Kronecker delta of two indices of the same size."""

    size: int

    @property
    def name(self) -> str:
        """What the operand is called in pictures and printed equations."""
        return "δ"

    @property
    def shape(self) -> Shape:
        """Shape of the operand in the contraction."""
        return (self.size, self.size)


Operand: TypeAlias = Leaf | Pattern | Delta

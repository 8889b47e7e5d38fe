"""Operands of a tensor network: leaves, index patterns and Kronecker deltas."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

from einconv_kfac.geometry import Axis
from einconv_kfac.network.step import VIEWS, Narrow, Shape, Step, reshaped

PATTERN_ROLES = ("k", "o", "i")
"""The indices of an index pattern, in order: kernel entry, output and input position."""


@dataclass(frozen=True)
class Leaf:
    """A tensor of the caller, and the steps that turn it into an operand.

    Args:
        name: The tensor's name in pictures and printed equations.
        slot: Its position among the caller's tensors.
        source: Shape of the caller's tensor.
        steps: Steps applied to it before the contraction.
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
        """Return the leaf with more steps; a view that undoes the last step cancels it."""
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
    """The index pattern ``P[k, o, i]`` of one axis, summed over the roles in ``summed``."""

    axis: Axis
    summed: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Name of the operand in pictures and printed equations."""
        return "P"

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles of the remaining indices, in order."""
        return tuple(role for role in PATTERN_ROLES if role not in self.summed)

    @cached_property
    def shape(self) -> Shape:
        """Shape of the operand in the contraction."""
        axis = self.axis
        sizes = {"k": axis.kernel_size, "o": axis.output_size, "i": axis.input_size}
        return tuple(sizes[role] for role in self.roles)

    def sum(self, role: str) -> Pattern:
        """Return the pattern summed over one more role."""
        return replace(
            self, summed=tuple(r for r in PATTERN_ROLES if r in self.summed or r == role)
        )


@dataclass(frozen=True)
class Delta:
    """The Kronecker delta of two indices of the same size."""

    size: int

    @property
    def name(self) -> str:
        """Name of the operand in pictures and printed equations."""
        return "δ"

    @property
    def shape(self) -> Shape:
        """Shape of the operand in the contraction."""
        return (self.size, self.size)


Operand: TypeAlias = Leaf | Pattern | Delta

"""The part of an objective between a model's outputs and a loss, after its graph is freed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.losses.loss_call import precise_type
from einconv_kfac.curvature.objective.graph import Edge
from einconv_kfac.curvature.objective.linear_map import LinearMap
from einconv_kfac.curvature.objective.loss_calls import LossCall
from einconv_kfac.curvature.objective.loss_model import Expansion
from einconv_kfac.curvature.objective.node_rule import Function
from einconv_kfac.curvature.objective.policies import Policy
from einconv_kfac.curvature.objective.terms import Term


@dataclass(frozen=True)
class Operation:
    """A nonlinear operation between outputs and loss.

    Args:
        kind: Its name.
        output: The edge of its output.
        inputs: For each input, its value in the recorded pass and how it changes with earlier
            outputs; the map is ``None`` for a constant.
        function: The operation, ``None`` if it cannot be evaluated again.
    """

    kind: str
    output: Edge
    inputs: tuple[tuple[Tensor | None, LinearMap | None], ...]
    function: Function | None

    @property
    def is_known(self) -> bool:
        """Whether the operation can be evaluated for other inputs."""
        return self.function is not None and all(value is not None for value, _ in self.inputs)

    def change(self, changes: Mapping[Edge, Tensor], *, create_graph: bool = False) -> Tensor:
        """Return the change of the output for changes of earlier tensors.

        It is computed in float32 at least: in lower precision the value is rounded by more than it
        changes.

        Args:
            changes: The changes by tensor.
            create_graph: Whether the result has a graph to the changes.
        """
        assert self.function is not None
        function, before = _precise(self.function, [value for value, _ in self.inputs])
        moved = [
            None if each is None else each(changes, create_graph=create_graph)
            for _, each in self.inputs
        ]
        after = [v if d is None else _plus(v, d) for v, d in zip(before, moved)]
        difference: Tensor = function(*after) - function(*before)
        return difference


@dataclass(frozen=True)
class Tail:
    """A loss as a function of a model's outputs, and of parameters that it uses itself.

    It is exact: between nonlinear operations, whose inputs in the recorded pass are kept, every
    tensor is an affine function of earlier ones.

    Args:
        sources: Edges of the outputs and parameters.
        values: Their values in the recorded pass.
        gradients: The derivative of the loss by each.
        loss: The loss in the recorded pass.
        weight: The weight of each of its numbers.
        terms: Finds the parts with curvature, which may take a Hessian.
        operations: The nonlinear operations, from outputs to loss.
        last: How the loss changes with outputs and operations.
        policies: The distributions of policy gradients.
    """

    sources: tuple[Edge, ...]
    values: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]
    loss: Tensor
    weight: Tensor
    terms: Callable[[], tuple[Term, ...]]
    operations: tuple[Operation, ...]
    last: LinearMap
    policies: tuple[Policy, ...] = ()

    def tensors(self) -> Iterator[Tensor]:
        """Yield the tensors of the script that operations are evaluated from again."""
        for operation in self.operations:
            function = operation.function
            options = function.keywords.values() if isinstance(function, partial) else ()
            given = function.targets if isinstance(function, LossCall) else ()
            for each in (*(value for value, _ in operation.inputs), *options, *given):
                if isinstance(each, Tensor):
                    yield each

    def at(self, outputs: Sequence[Tensor]) -> Tail:
        """See `LossModel`."""
        return replace(self, values=(*outputs, *self.values[len(outputs) :]))

    def precision(self) -> torch.dtype:
        """See `LossModel`; modules are called in the type of their input."""
        has_modules = any(isinstance(each.function, LossCall) for each in self.operations)
        return self.loss.dtype if has_modules else precise_type(self.loss)

    def unknown(self) -> Sequence[str]:
        """See `LossModel`."""
        return sorted({each.kind for each in self.operations if not each.is_known})

    def value(self, outputs: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
        """See `LossModel`; for ``create_graph`` see `result`."""
        return (self.weight * self.result(outputs, create_graph=create_graph)).sum()

    def result(self, outputs: Sequence[Tensor], *, create_graph: bool = False) -> Tensor:
        """Return each number of the loss.

        Args:
            outputs: The outputs.
            create_graph: Whether the result has a graph to the outputs.
        """
        change = self.last(self._changes(outputs, create_graph), create_graph=create_graph)
        return self.loss if change is None else self.loss.to(precise_type(self.loss)) + change

    def _changes(self, outputs: Sequence[Tensor], create_graph: bool) -> dict[Edge, Tensor]:
        """Return the changes of outputs and operations; for the arguments see `result`."""
        changes = {e: _difference(*pair) for e, *pair in zip(self.sources, outputs, self.values)}
        with torch.set_grad_enabled(create_graph):
            for operation in self.operations:
                changes[operation.output] = operation.change(changes, create_graph=create_graph)
        return changes

    @property
    def has_policies(self) -> bool:
        """See `LossModel`."""
        return bool(self.policies)

    def divergence(self, outputs: Sequence[Tensor]) -> Tensor:
        """See `LossModel`."""
        changes = self._changes(outputs, create_graph=False)
        return torch.stack([policy.divergence(changes) for policy in self.policies]).sum(0)

    def slopes(self) -> Sequence[Tensor | None]:
        """See `LossModel`."""
        return self.gradients

    def expansion(self, tangents: Sequence[Sequence[Tensor | None]]) -> Expansion:
        """See `LossModel`."""
        several = [{e: t for e, t in zip(self.sources, own) if t is not None} for own in tangents]
        total = self.loss.new_zeros(len(several), len(several), dtype=torch.float64)
        for term in self.terms():
            found = term.products(several)
            total = total if found is None else total + found
        return Expansion(torch.stack([self._slope(own) for own in several]), total)

    def _slope(self, vectors: Mapping[Edge, Tensor]) -> Tensor:
        """Return the derivative of the loss along tangents of the sources, in float64."""
        total = self.loss.new_zeros((), dtype=torch.float64)
        for edge, gradient in zip(self.sources, self.gradients):
            if edge in vectors and gradient is not None:
                total = total + (gradient.double() * vectors[edge].double()).sum()
        return total


def _difference(new: Tensor, old: Tensor) -> Tensor:
    """Return how an output changed; infinite entries, as of masked scores, stay."""
    return (new - old).where(old.isfinite(), 0)


def _plus(value: Tensor | None, change: Tensor) -> Tensor:
    """Return a changed input; infinite entries, as of masked scores, stay."""
    assert value is not None
    return (value + change).where(value.isfinite(), value)


def _precise(
    function: Function, inputs: Sequence[Tensor | None]
) -> tuple[Function, list[Tensor | None]]:
    """Return an operation and its inputs in float32 at least; a module keeps those it was given."""
    if isinstance(function, LossCall):
        return function, [*inputs]
    if isinstance(function, partial):
        options = {name: _as_precise(own) for name, own in function.keywords.items()}
        function = partial(function.func, *function.args, **options)
    return function, [_as_precise(value) for value in inputs]


def _as_precise(value: Any) -> Any:
    """Return a tensor of real floating-point numbers in float32 at least; others as they are."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.to(precise_type(value))

"""A loss on one batch, and root vectors of its curvature."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.losses import evaluate_loss, has_targets, loss_rule
from einconv_kfac.curvature.losses.loss_rule import TorchLossRule
from einconv_kfac.curvature.objective.graph import (
    WRAPPER,
    Edge,
    NodeOrder,
    backpropagated,
    dependents,
    edge_of,
    kind_of_node,
    within,
    zeros_at,
)
from einconv_kfac.curvature.objective.ignored_labels import (
    ignores_all_labels,
    is_mean_of_labels,
)
from einconv_kfac.curvature.objective.reading import Reading


class Root(NamedTuple):
    """A root vector of the curvature of a loss.

    Args:
        vectors: A vector for each output.
        is_alone: Whether it is of one unit of the loss alone, on which several examples may have
            an influence together, as the score of a pair. The others have units of each example.
    """

    vectors: Sequence[Tensor]
    is_alone: bool = False


class Evaluation(Protocol):
    """A loss on one batch, and vectors at the model's outputs that describe its curvature."""

    @property
    def heads(self) -> Sequence[Tensor | GradientEdge]:
        """The outputs ``[n, ...]`` on which the loss depends, with their graph."""

    @property
    def outputs(self) -> Sequence[Tensor | GradientEdge]:
        """The same inside of what is wrapped around the model, see `within`."""

    @property
    def loss(self) -> Tensor | GradientEdge:
        """The loss, with its graph."""

    @property
    def weight(self) -> Tensor:
        """The weight of each number of the loss, shaped like it."""

    @property
    def examples(self) -> int:
        """The number of examples, the first dimension of the outputs."""

    @property
    def is_empty(self) -> bool:
        """Whether no target enters the loss, as if all are ignored."""

    @property
    def shows_emptiness(self) -> bool:
        """Whether the loss is not finite if no target enters it, as a mean over targets."""

    @property
    def takes_unbatched(self) -> bool:
        """Whether outputs may be those of an unbatched input, without a dimension of examples."""

    def like_outputs(self) -> Sequence[Tensor]:
        """Return tensors like the outputs, ``[1, *f]`` for one without a dimension of examples."""

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """Draw a root vector for each output whose second moment is the curvature of the loss."""

    def samples(self, generator: Generator) -> Iterator[Sequence[Tensor]]:
        """Yield what calls of `sample`, one after the other, return; without end."""

    def roots(self) -> Iterator[Root]:
        """Yield root vectors for each output that reproduce the curvature of the loss."""


@dataclass(frozen=True)
class RuleEvaluation:
    """A loss module on a model's output, with a rule for the module.

    Args:
        loss_fn: The loss.
        output: The output, ``[n, ...]``.
        target: The target, or several as a tuple.
        given: The loss of the two, if it was computed already.
        settings: Returns a context in which it is computed, with the settings of autocast.
    """

    loss_fn: nn.Module
    output: Tensor
    target: Any
    given: Tensor | None = None
    settings: Callable[[], AbstractContextManager[Any]] = nullcontext

    @cached_property
    def loss(self) -> Tensor:
        """See `Evaluation`."""
        if self.given is not None:
            return self.given
        with self.settings():
            return evaluate_loss(self.loss_fn, self.output, self.target)

    @property
    def heads(self) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return (self.output,)

    @property
    def outputs(self) -> Sequence[Tensor | GradientEdge]:
        """See `Evaluation`."""
        if not self.output.requires_grad:
            return (self.output,)
        edge = edge_of(self.output)
        return (self.output,) if within(edge) == edge else (GradientEdge(*within(edge)),)

    @property
    def weight(self) -> Tensor:
        """See `Evaluation`."""
        return torch.ones_like(self.loss.detach())

    @property
    def examples(self) -> int:
        """See `Evaluation`."""
        return first_size(self.like_outputs())

    @property
    def is_empty(self) -> bool:
        """See `Evaluation`."""
        return not has_targets(self.loss_fn, self.output, self.target)

    @property
    def shows_emptiness(self) -> bool:
        """See `Evaluation`."""
        return getattr(self.loss_fn, "reduction", "") == "mean"

    takes_unbatched = False

    def like_outputs(self) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return (self.output.detach(),)

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """See `Evaluation`."""
        rule = loss_rule(self.loss_fn)
        return (rule.sample(self.loss_fn, self.output.detach(), self.target, generator),)

    def samples(self, generator: Generator) -> Iterator[Sequence[Tensor]]:
        """See `Evaluation`."""
        rule = loss_rule(self.loss_fn)
        if isinstance(rule, TorchLossRule):
            for own in rule.samples(self.loss_fn, self.output.detach(), self.target, generator):
                yield (own,)
        while True:
            yield self.sample(generator)

    def roots(self) -> Iterator[Root]:
        """See `Evaluation`."""
        rule = loss_rule(self.loss_fn)
        for root in rule.roots(self.loss_fn, self.output.detach(), self.target):
            yield Root((root,))


@dataclass(frozen=True)
class ReadEvaluation:
    """A loss that was read off the autograd graph.

    Args:
        reading: The reading.
    """

    reading: Reading

    @property
    def loss(self) -> GradientEdge:
        """See `Evaluation`."""
        return GradientEdge(*self.reading.graph.root)

    @property
    def weight(self) -> Tensor:
        """See `Evaluation`."""
        return self.reading.weight

    @property
    def heads(self) -> Sequence[GradientEdge]:
        """See `Evaluation`."""
        return [GradientEdge(*edge) for edge in self.reading.graph.ends]

    @property
    def outputs(self) -> Sequence[GradientEdge]:
        """See `Evaluation`."""
        return [GradientEdge(*within(edge)) for edge in self.reading.graph.ends]

    @property
    def examples(self) -> int:
        """See `Evaluation`."""
        return first_size(self.like_outputs())

    @property
    def is_empty(self) -> bool:
        """See `Evaluation`."""
        return ignores_all_labels(self.reading.graph)

    @property
    def shows_emptiness(self) -> bool:
        """See `Evaluation`."""
        return is_mean_of_labels(self.reading.graph)

    takes_unbatched = True

    def like_outputs(self) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return self.filled({})

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return self.filled(self.reading.sample(generator))

    def samples(self, generator: Generator) -> Iterator[Sequence[Tensor]]:
        """See `Evaluation`."""
        while True:
            yield self.sample(generator)

    def roots(self) -> Iterator[Root]:
        """See `Evaluation`."""
        for found, is_alone in self.reading.roots():
            yield Root(self.filled(found), is_alone)

    def filled(self, found: Mapping[Edge, Tensor]) -> Sequence[Tensor]:
        """Return a vector for each output, of zeros where there is none; see `like_outputs`."""
        graph = self.reading.graph
        own = {e: found[e] if e in found else zeros_at(e) for e in graph.ends}
        return [v.unsqueeze(0) if e in graph.unbatched else v for e, v in own.items()]


def first_size(outputs: Sequence[Tensor]) -> int:
    """Return the first dimension of outputs; numbers do not count."""
    return next((output.shape[0] for output in outputs if output.ndim), 1)


def loss_gradients(evaluation: Evaluation) -> list[Tensor]:
    """Return the gradient of a loss at each output of the model; the graph is kept."""
    if isinstance(evaluation, ReadEvaluation):
        return [*evaluation.filled(evaluation.reading.graph.ends)]
    ends = [*map(_edge, evaluation.heads)]
    with torch.no_grad():
        start = {_edge(evaluation.loss): evaluation.weight}
        found = backpropagated(start, _operations(evaluation), ends.__contains__)
    pairs = zip(ends, evaluation.like_outputs())
    return [found[end] if end in found else torch.zeros_like(like) for end, like in pairs]


def _edge(end: Tensor | GradientEdge) -> Edge:
    """Return the edge of a tensor, or of what stands for one."""
    return (end.node, end.output_nr) if isinstance(end, GradientEdge) else edge_of(end)


def _operations(evaluation: Evaluation) -> NodeOrder:
    """Return the operations between the outputs of a model and a loss."""
    return dependents(_edge(evaluation.loss), [*map(_edge, evaluation.heads)].__contains__)


def empirical_roots(
    evaluation: Evaluation,
) -> tuple[Sequence[Tensor | GradientEdge], Sequence[Tensor]]:
    """Return where the backward pass of a loss begins in the model, and with which vectors.

    It begins at the loss, unless a wrapper stands between the outputs and the model.
    """
    is_known = any(_differ(*ends) for ends in zip(evaluation.outputs, evaluation.heads))
    if is_known or any(kind_of_node(node) == WRAPPER for node in _operations(evaluation)):
        return evaluation.outputs, loss_gradients(evaluation)
    return (evaluation.loss,), (evaluation.weight,)


def _differ(output: Tensor | GradientEdge, head: Tensor | GradientEdge) -> bool:
    """Return whether a wrapper stands between an output and where it leaves the model."""
    if not isinstance(output, GradientEdge):
        return False
    return not isinstance(head, GradientEdge) or output[:2] != head[:2]

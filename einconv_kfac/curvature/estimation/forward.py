"""Evaluation of a model and its loss on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, TypeAlias

from torch import Generator, Tensor, nn
from torch.autograd.graph import GradientEdge

from einconv_kfac.curvature.losses import evaluate_loss, loss_rule
from einconv_kfac.curvature.objective.graph import Edge, zeros_at
from einconv_kfac.curvature.objective.reading import Reading

Forward: TypeAlias = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""Runs a model on a batch and returns its output and the target."""


class Evaluation(Protocol):
    """A loss on one batch, and vectors at the model's outputs that describe its curvature."""

    @property
    def outputs(self) -> Sequence[Tensor | GradientEdge]:
        """The outputs ``[n, ...]`` on which the loss depends, with their graph."""

    @property
    def loss(self) -> Tensor | GradientEdge:
        """The loss, with its graph."""

    @property
    def value(self) -> Tensor:
        """The loss, detached."""

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """Draw a root vector for each output whose second moment is the curvature of the loss."""

    def roots(self) -> Iterator[Sequence[Tensor]]:
        """Yield root vectors for each output that reproduce the curvature of the loss."""


@dataclass(frozen=True)
class RuleEvaluation:
    """A loss module on a model's output, with a rule for the module.

    Args:
        loss_fn: The loss.
        output: The output, ``[n, ...]``.
        target: The target, or several as a tuple.
        given: The loss of the two, if it was computed already.
    """

    loss_fn: nn.Module
    output: Tensor
    target: Any
    given: Tensor | None = None

    @cached_property
    def loss(self) -> Tensor:
        """See `Evaluation`."""
        if self.given is not None:
            return self.given
        return evaluate_loss(self.loss_fn, self.output, self.target)

    @property
    def outputs(self) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return (self.output,)

    @property
    def value(self) -> Tensor:
        """See `Evaluation`."""
        return self.loss.detach()

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """See `Evaluation`."""
        rule = loss_rule(self.loss_fn)
        return (rule.sample(self.loss_fn, self.output.detach(), self.target, generator),)

    def roots(self) -> Iterator[Sequence[Tensor]]:
        """See `Evaluation`."""
        rule = loss_rule(self.loss_fn)
        for root in rule.roots(self.loss_fn, self.output.detach(), self.target):
            yield (root,)


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
        return GradientEdge(*self.reading.root)

    @property
    def value(self) -> Tensor:
        """See `Evaluation`."""
        return self.reading.loss

    @property
    def outputs(self) -> Sequence[GradientEdge]:
        """See `Evaluation`."""
        return [GradientEdge(*edge) for edge in self.reading.outputs]

    def sample(self, generator: Generator) -> Sequence[Tensor]:
        """See `Evaluation`."""
        return self._filled(self.reading.sample(generator))

    def roots(self) -> Iterator[Sequence[Tensor]]:
        """See `Evaluation`."""
        for found in self.reading.roots():
            yield self._filled(found)

    def _filled(self, found: Mapping[Edge, Tensor]) -> Sequence[Tensor]:
        """Return a root vector for each output, of zeros where there is none."""
        return [found[e] if e in found else zeros_at(e) for e in self.reading.outputs]


def evaluated(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None = None
) -> RuleEvaluation:
    """Evaluate a model and its loss on a batch.

    Args:
        model: The model. If ``loss_fn`` is one of its submodules, the loss of that call is
            returned.
        loss_fn: The loss module.
        batch: One batch, ``(x, y)`` without ``forward``.
        forward: Runs the model on the batch.

    Raises:
        ValueError: If the batch is not a pair and there is no ``forward``.
        RuntimeError: If ``loss_fn`` is a submodule that is not called exactly once.
    """
    if any(module is loss_fn for module in model.modules()):
        return _evaluated_inside(model, loss_fn, batch, forward)
    output, target = (_on_pair if forward is None else forward)(model, batch)
    return RuleEvaluation(loss_fn, output, target)


def uncompiled(model: nn.Module) -> nn.Module:
    """Return the module that ``torch.compile`` wrapped, or the model itself."""
    original = getattr(model, "_orig_mod", model)
    assert isinstance(original, nn.Module)
    return original


def _evaluated_inside(
    model: nn.Module, loss_fn: nn.Module, batch: Any, forward: Forward | None
) -> RuleEvaluation:
    """Evaluate a model that computes its loss itself."""
    seen: list[RuleEvaluation] = []

    def record(_: nn.Module, inputs: tuple[Any, ...], loss: Tensor) -> None:
        output, *targets = inputs
        target = targets[0] if len(targets) == 1 else tuple(targets)
        seen.append(RuleEvaluation(loss_fn, output, target, loss))

    handle = loss_fn.register_forward_hook(record)
    try:
        _called(model, batch) if forward is None else forward(model, batch)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise RuntimeError(
            f"A model that computes its loss must call `loss_fn` once per batch, got {len(seen)} "
            "calls."
        )
    return seen[0]


def _on_pair(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
    """Run the model on a batch ``(x, y)``."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise ValueError(
            f"`data` must yield pairs (x, y), got {type(batch).__name__}. Pass `forward` for "
            "batches of another form."
        )
    x, y = batch
    return _called(model, x), y


def _called(model: nn.Module, x: Any) -> Tensor:
    """Return the model's output for one input, several, or named ones."""
    output: Tensor
    if isinstance(x, Mapping):
        output = model(**x)
    elif isinstance(x, (tuple, list)):
        output = model(*x)
    else:
        output = model(x)
    return output

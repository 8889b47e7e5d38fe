"""A layer as a linear map shared over positions: ``y[n, s] = W a[n, s] (+ b)`` per group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Generator, Tensor, nn
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.factors.approximation import (
    Approximation,
    second_moment,
    squares,
    weight_sharing,
    with_ones,
)
from einconv_kfac.curvature.module_hooks import PartialHook
from einconv_kfac.curvature.type_registry import Kind

Record: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes the input and the output of a call; it may have an attribute ``is_active``."""


@dataclass(frozen=True)
class LayerExample:
    """A small model with one layer that a rule covers, and inputs for it.

    Args:
        build: Returns the model; its output is one tensor ``[n, ...]``.
        shape: Shape ``[n, ...]`` of an input.
        classes: Number of classes if inputs are class indices; otherwise they are normal.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    classes: int | None = None

    def inputs(self, generator: Generator) -> Tensor:
        """Draw an input, in float64 if it is not made of indices."""
        if self.classes is not None:
            return torch.randint(self.classes, self.shape, generator=generator)
        return torch.randn(self.shape, generator=generator, dtype=torch.float64)


class LayerRule(ABC):
    """Describes one type of layer to K-FAC.

    `inputs` and `outputs` define the factors; `input_factor` and `output_factor` follow from
    them, and subclasses may override these with faster ones. A rule has no state.

    A rule in a file of its own in ``layers/rules/`` is found by the registry and by the tests,
    if it has `kinds` and `examples`. Other rules are given to `register_layer`.

    Attributes:
        kinds: The types of layers that the rule applies to, with their subclasses. Those of other
            libraries are strings: ``"library.file.Type"``.
        examples: Models on which the tests compare the rule with automatic differentiation.
        preconditioned: Whether the optimizer preconditions such layers by default.
        one_hot: Whether inputs ``a`` are one-hot; `indices` returns where they are 1. The factor
            ``A`` of ``"expand"`` is then diagonal.
        weight: Name of the weight in the module.
        bias: Name of the bias in the module, if it has one.
        may_compute_weight: Whether the weight may be computed from parameters (`ComputedWeight`).
        has_own_scale: Whether the factors of such layers, and of layers before them, may be off by
            a factor of their own, for which the automatic step has a coefficient.
        row_dim: The dimension of inputs and outputs ``[n, ...]`` in front of which an example may
            have rows ``[n, rows, ...]``, as another dimension of positions; ``None`` if each row
            is a call of its own. It is 1 where any dimensions may be in front of the features.
        sees_inner_calls: Whether it records functions of torch that the module calls, so that the
            module may have a forward pass of its own.
        revealed: Types of submodules whose hooks the module bypasses unless it is watched.
    """

    kinds: ClassVar[tuple[Kind, ...]] = ()
    examples: ClassVar[tuple[LayerExample, ...]] = ()
    preconditioned = True
    may_compute_weight = False
    has_own_scale = False
    row_dim: int | None = None
    one_hot = False
    sees_inner_calls = False
    weight, bias = "weight", "bias"
    revealed: ClassVar[tuple[type[nn.Module], ...]] = ()

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how the weight becomes ``[g, co, *d]``: the shape it is split to, then the order.

        The default is for a weight ``[co, *d]`` without groups.
        """
        shape = getattr(module, self.weight).shape
        return (1, *shape), tuple(range(1 + len(shape)))

    def refusal(self, module: Any) -> str | None:
        """Return the reason why this instance cannot be covered, or ``None`` if it can."""
        return None

    def parts(self, module: Any) -> tuple[LayerRule, ...]:
        """Return the rules of a module with several weights, each of which is a layer.

        A part is an equal object for all modules of a type. The default is the rule itself.
        """
        return (self,)

    def reveal(self, module: Any, inner: nn.Module) -> LayerRule | None:
        """Return the rule of a `revealed` submodule, or ``None`` for that of its type."""
        return None

    def accepts(self, module: Any, x: Tensor) -> bool:
        """Return whether an input is a batch, as opposed to a single example."""
        return x.ndim >= 2

    def may_join(self, module: Any, x: Tensor) -> bool:
        """Return whether calls with inputs like ``x [n, ...]`` may be computed as one.

        Their examples are one behind the other then. A rule whose factors depend on the examples
        of a call in another way than by a mean over them must not allow it.
        """
        return False

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """Record the calls of a module from now on; return a function that ends it."""
        hook = PartialHook(_record_call, record)
        handle: RemovableHandle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
        return handle.remove

    @abstractmethod
    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """Return a call's inputs ``a [n, g, d, s]`` of the linear map, without the 1 of a bias."""

    @abstractmethod
    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """Return a tensor of the output's shape ``[n, ...]`` as ``[n, g, co, s]``."""

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """Return the number ``s`` of weight-sharing positions of an output."""
        like = torch.empty(tuple(y_shape), device="meta")
        return self.outputs(module, like).shape[-1]

    def products(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> int:
        """Return how many vectors a forward pass multiplies by the weight, for one example."""
        return self.positions(module, y_shape)

    def indices(self, module: Any, x: Tensor) -> Tensor:
        """Return which entry of ``a`` is 1, ``[n, s]``, or ``d`` where none is, if `one_hot`."""
        raise NotImplementedError

    def input_sums(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """Return the sums of ``a`` over positions, ``[n, g, d, 1]``."""
        return self.inputs(module, x, y_shape).sum(-1, keepdim=True)

    def columns(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
    ) -> Tensor:
        """Return the columns ``[n, g, d, s]`` whose second moment is ``A``, see `input_factor`."""
        a = weight_sharing(approximation).inputs(self.inputs(module, x, y_shape))
        return with_ones(a) if bias else a

    def input_diagonal(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """Return the diagonal of ``A``, ``[g, d]``, without ``A``; see `input_factor`."""
        a = self.columns(module, x, y_shape, approximation, bias)
        return squares(a, a.shape[0], **into)

    def output_diagonal(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """Return the diagonal of ``B``, ``[g, co]``, without ``B``; see `output_factor`."""
        g, sharing = self.outputs(module, gradient), weight_sharing(approximation)
        count = sharing.term_count(g.shape[0], g.shape[-1])
        return squares(sharing.gradients(g), count, **into)

    def input_factor(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """Return ``A`` as ``[g, d, d]``, a sum over positions and a mean over examples.

        Args:
            module: The layer.
            x: A call's input.
            y_shape: The shape of the call's output.
            approximation: ``"expand"`` or ``"reduce"``.
            bias: Whether ``a`` ends with a constant 1.
            into: ``out``, ``beta``, ``alpha``: the result is ``beta * out + alpha * A``.
        """
        a = self.columns(module, x, y_shape, approximation, bias)
        return second_moment(a, a.shape[0], **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """Return ``B`` as ``[g, co, co]``, a mean over examples and, if expanded, positions.

        Args:
            module: The layer.
            gradient: A gradient like a call's output.
            approximation: ``"expand"`` or ``"reduce"``.
            into: See `input_factor`.
        """
        g, sharing = self.outputs(module, gradient), weight_sharing(approximation)
        count = sharing.term_count(g.shape[0], g.shape[-1])
        return second_moment(sharing.gradients(g), count, **into)


def _record_call(record: Record, _: Any, inputs: tuple[Any, ...], *rest: Any) -> None:
    """Record the first input and the output of a call, as a forward hook.

    Torch leaves out the keyword arguments where the hook is removed while the hooks of a module
    are called, as by the garbage collector after the optimizer.
    """
    *keywords, output = rest
    values = [*inputs, *(value for own in keywords for value in own.values())]
    if values:
        record(values[0], output)

"""A layer as a linear map shared over positions: ``y[n, s] = W a[n, s] (+ b)`` per group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

Approximation: TypeAlias = Literal["expand", "reduce"]
Record: TypeAlias = Callable[[Tensor, Tensor], None]
"""Takes the input and the output of a call."""


class LayerRule(ABC):
    """Describes one type of layer to K-FAC.

    `inputs` and `outputs` define everything; the factors have defaults that follow from them
    and may be overridden by faster ones. A rule has no state of its own.

    Attributes:
        preconditioned: Whether the optimizer preconditions such layers by default.
        weight: Name of the weight in the module.
        bias: Name of the bias in the module, if it has one.
    """

    preconditioned = True
    weight, bias = "weight", "bias"

    def split(self, module: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return how the weight becomes ``[g, co, *d]``: its shape split, and the order of that.

        By default the weight is ``[co, *d]`` and there is one group.
        """
        return (1, *module.weight.shape), tuple(range(1 + module.weight.ndim))

    def refusal(self, module: Any) -> str | None:
        """Return why this instance cannot be covered, or ``None`` if it can."""
        return None

    def accepts(self, module: Any, x: Tensor) -> bool:
        """Tell whether an input is a batch, as opposed to a single example."""
        return x.ndim >= 2

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """Have the calls of a module recorded, and return what undoes that."""
        handle: RemovableHandle = module.register_forward_hook(
            partial(_call_record, record), with_kwargs=True
        )
        return handle.remove

    @abstractmethod
    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """Return ``a`` as ``[n, g, d, s]``, without the bias' 1, for a call's input and output."""

    @abstractmethod
    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """Return a tensor like the output, ``[n, ...]``, as ``[n, g, co, s]``."""

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """Return the number ``s`` of weight-sharing positions of an output."""
        like = torch.empty(tuple(y_shape), device="meta")
        return self.outputs(module, like).shape[-1]

    def input_factor(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """Return ``A`` as ``[g, d, d]``.

        Args:
            module: The layer.
            x: A call's input.
            y_shape: The shape of the call's output.
            approximation: ``"expand"`` or ``"reduce"``.
            bias: Whether ``a`` ends with a constant 1.
            into: ``out``, ``beta``, ``alpha``: the result is ``beta * out + alpha * A``.
        """
        a = self.inputs(module, x, y_shape)
        a = a.mean(-1, keepdim=True) if approximation == "reduce" else a
        return second_moment(with_ones(a) if bias else a, a.shape[0], **into)

    def output_factor(
        self, module: Any, gradient: Tensor, approximation: Approximation, **into: Any
    ) -> Tensor:
        """Return ``B`` as ``[g, co, co]`` for a gradient like the output; see `input_factor`."""
        g = self.outputs(module, gradient)
        terms = g.shape[0] * (1 if approximation == "reduce" else g.shape[-1])
        g = g.sum(-1, keepdim=True) if approximation == "reduce" else g
        return second_moment(g, terms, **into)


def _call_record(
    record: Record, _: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
) -> None:
    """Record the first input and the output of a call, as a forward hook."""
    record(inputs[0] if inputs else next(iter(keywords.values())), output)


def with_ones(a: Tensor) -> Tensor:
    """Append a constant 1 to ``a [n, g, d, *s]`` along ``d``."""
    return torch.cat([a, torch.ones_like(a[:, :, :1])], dim=2)


def second_moment(
    columns: Tensor,
    terms: int,
    *,
    out: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> Tensor:
    """Return ``beta * out + alpha / terms * sum_{n,s} a a^T`` for ``a [n, g, d, s]``."""
    dtype = torch.promote_types(columns.dtype, torch.float32)
    a = columns.detach().to(dtype).permute(1, 2, 0, 3).flatten(2)
    if out is None:
        return torch.bmm(a, a.mT).mul_(alpha / terms)
    return out.baddbmm_(a, a.mT, beta=beta, alpha=alpha / terms)

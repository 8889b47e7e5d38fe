"""Layers as linear maps shared over positions: ``y[n, s] = W a[n, s] (+ b)``.

A rule says, for one type of layer, how its weight and bias form one matrix per channel group
``[g, co, d]`` (the bias is the last column) and which Kronecker factors belong to it. Rules
are looked up like ``isinstance``, the most recently registered first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from einconv_kfac.curvature import factors
from einconv_kfac.geometry import convolution
from einconv_kfac.padding import pad_input

Approximation: TypeAlias = Literal["expand", "reduce"]


class LayerRule(Protocol):
    """What K-FAC needs to know about one type of layer.

    ``into`` stands for the keyword arguments ``out``, ``beta`` and ``alpha``: the factor is
    written to ``beta * out + alpha * factor``.
    """

    def positions(self, layer: Any, y_shape: Sequence[int]) -> int:
        """Return the number of weight-sharing positions of an output ``[n, ...]``."""

    def input_factor(
        self, layer: Any, x: Tensor, *, approximation: Approximation, bias: bool, **into: Any
    ) -> Tensor:
        """Return ``A`` as ``[g, d, d]`` for an input ``x``."""

    def output_factor(
        self, layer: Any, gradient: Tensor, *, approximation: Approximation, **into: Any
    ) -> Tensor:
        """Return ``B`` as ``[g, co, co]`` for gradients ``[v, *y]``, summed over ``v``."""

    def to_rows(self, layer: Any, weight: Tensor) -> Tensor:
        """Return a tensor shaped like the weight as ``[g, co, d]``."""

    def from_rows(self, layer: Any, rows: Tensor) -> Tensor:
        """Undo `to_rows`."""


class _LinearRule:
    """``torch.nn.Linear``; every dimension between the first and the last is a position."""

    def positions(self, layer: nn.Linear, y_shape: Sequence[int]) -> int:
        return prod(y_shape[1:-1])

    def input_factor(
        self,
        layer: nn.Linear,
        x: Tensor,
        *,
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        return factors.linear_input_factor(x, approximation, bias, **into)

    def output_factor(
        self, layer: nn.Linear, gradient: Tensor, *, approximation: Approximation, **into: Any
    ) -> Tensor:
        vectors, examples, *_, channels = gradient.shape
        rows = gradient.reshape(vectors, examples, -1, channels)
        return factors.output_factor(rows, 1, approximation, **into)

    def to_rows(self, layer: nn.Linear, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)

    def from_rows(self, layer: nn.Linear, rows: Tensor) -> Tensor:
        return rows.squeeze(0)


class _ConvRule:
    """Convolutions in any dimension; output positions share the weight."""

    def positions(self, layer: _ConvNd, y_shape: Sequence[int]) -> int:
        return prod(y_shape[2:])

    def input_factor(
        self, layer: _ConvNd, x: Tensor, *, approximation: Approximation, bias: bool, **into: Any
    ) -> Tensor:
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            size, kernel = x.shape[2:], layer.kernel_size
            sides = convolution(size, kernel, layer.stride, padding, layer.dilation).padding
            x, padding = pad_input(x, sides, layer.padding_mode), 0
        return factors.conv_input_factor(
            x,
            layer.kernel_size,
            layer.stride,
            padding,
            layer.dilation,
            layer.groups,
            approximation,
            bias,
            **into,
        )

    def output_factor(
        self, layer: _ConvNd, gradient: Tensor, *, approximation: Approximation, **into: Any
    ) -> Tensor:
        return factors.conv_output_factor(gradient, layer.groups, approximation, **into)

    def to_rows(self, layer: _ConvNd, weight: Tensor) -> Tensor:
        return weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)

    def from_rows(self, layer: _ConvNd, rows: Tensor) -> Tensor:
        return rows.reshape(layer.weight.shape)


_RULES: list[tuple[type[nn.Module], LayerRule]] = [
    (nn.Linear, _LinearRule()),
    (_ConvNd, _ConvRule()),
]


def layer_rule(layer: nn.Module) -> LayerRule | None:
    """Return the rule for a layer, or ``None`` if no rule covers its type."""
    if isinstance(layer, _ConvTransposeNd):
        return None
    return next((rule for kind, rule in reversed(_RULES) if isinstance(layer, kind)), None)


@dataclass(frozen=True)
class Layer:
    """A layer with a rule, and the names of the parameters it trains.

    Args:
        name: Its name in the model.
        module: The module.
        rule: The rule for its type.
        weight: Name of the weight in the model.
        bias: Name of the bias, or ``None`` if it has none that is trained.
    """

    name: str
    module: nn.Module
    rule: LayerRule
    weight: str
    bias: str | None

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that the layer's factors cover."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def zeros(self) -> dict[str, Tensor]:
        """Return a zero tensor per parameter."""
        own = dict(self.module.named_parameters(recurse=False))
        return {name: torch.zeros_like(own[name.rpartition(".")[2]]) for name in self.parameters}

    def to_matrix(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return tensors by parameter name as one matrix per group, ``[g, co, d]``."""
        rows = self.rule.to_rows(self.module, tensors[self.weight])
        if self.bias is None:
            return rows
        return torch.cat([rows, tensors[self.bias].reshape(*rows.shape[:2], 1)], dim=-1)

    def from_matrix(self, matrix: Tensor) -> dict[str, Tensor]:
        """Return matrices ``[g, co, d]`` as tensors by parameter name."""
        if self.bias is None:
            return {self.weight: self.rule.from_rows(self.module, matrix)}
        weight = self.rule.from_rows(self.module, matrix[..., :-1])
        return {self.weight: weight, self.bias: matrix[..., -1].flatten()}


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a model whose weight is trained and that a rule covers.

    Raises:
        ValueError: If two modules share a weight, which has no single block.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    layers: list[Layer] = []
    for name, module in model.named_modules():
        rule = layer_rule(module)
        own = dict(module.named_parameters(recurse=False))
        weight, bias = own.get("weight"), own.get("bias")
        if rule is None or weight is None or not weight.requires_grad:
            continue
        trained = None if bias is None or not bias.requires_grad else names[bias]
        layers.append(Layer(name, module, rule, names[weight], trained))
    _refuse_shared(layers)
    return layers


def _refuse_shared(layers: Sequence[Layer]) -> None:
    """Raise if two modules train the same parameter."""
    owner: dict[str, str] = {}
    for layer in layers:
        for parameter in layer.parameters:
            if parameter in owner:
                raise ValueError(
                    f"Parameters must belong to one module, but '{layer.name}' and "
                    f"'{owner[parameter]}' share '{parameter}'. Call one module twice instead."
                )
            owner[parameter] = layer.name

"""Recurrent layers and cells of torch; each weight is a layer, whose positions are the steps.

The approximation is that of ``"expand"`` for weights that are shared over time; Martens, Ba and
Johnson (2018) also model how the gradients of different steps depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.interception import intercepted
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule, Record
from einconv_kfac.curvature.layers.recurrent_steps import (
    CELL_REPLACEMENTS,
    LAYER_REPLACEMENTS,
    bias_of,
)
from einconv_kfac.curvature.layers.rules.linear import LinearRule


class _Inputs(nn.Module):
    """A recurrent module whose weights for the inputs alone are trained, for the examples."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        for name, parameter in module.named_parameters():
            parameter.requires_grad_("_ih" in name)

    def forward(self, x: Tensor) -> Tensor:
        found = self.module(x)
        result: Tensor = found if isinstance(found, Tensor) else found[0]
        return result


class RecurrentRule(LinearRule):
    """One weight of a recurrent layer or cell. Inputs are ``[n, t, d]`` or, of a step, ``[n, d]``.

    Those of padded sequences have one more entry, see `recurrent_steps`. With ``"reduce"``, the
    steps of weights with a call for each are averaged over the longest sequence.

    The approximation leaves out how steps depend on each other. So it may be off by a factor as
    large as their number, also for layers whose gradients come through these.

    Args:
        weight: Its name.
    """

    has_own_scale = True
    kinds = (nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell, nn.RNNCell)
    examples = (
        LayerExample(lambda: _Inputs(nn.GRU(4, 3, batch_first=True)), (3, 2, 4)),
        LayerExample(lambda: _Inputs(nn.RNNCell(4, 3)), (3, 4)),
    )

    def __init__(self, weight: str = "weight_ih_l0") -> None:
        self.weight, self.bias = weight, bias_of(weight)

    def parts(self, module: Any) -> tuple[LayerRule, ...]:
        """See `LayerRule`."""
        own = dict(module.named_parameters(recurse=False))
        return tuple(_part(name) for name in own if name.startswith("weight_"))

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        if self._is_marked(module, x):
            x = x[..., :-1] / x[..., -1].max()
        return super().inputs(module, x, y_shape)

    def input_factor(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
        **into: Any,
    ) -> Tensor:
        """See `LayerRule`."""
        given = module, x, y_shape, approximation, bias
        if self._is_marked(module, x):
            return LayerRule.input_factor(self, *given, **into)
        return super().input_factor(*given, **into)

    def may_join(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`; marks of padding are relative to those of the call."""
        return not self._is_marked(module, x)

    def columns(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
    ) -> Tensor:
        """See `LayerRule`."""
        if not self._is_marked(module, x):
            return super().columns(module, x, y_shape, approximation, bias)
        a = super().inputs(module, x, y_shape)  # n 1 (d 1) s
        if approximation == "reduce":
            weights = a[:, :, -1:].sum(-1, keepdim=True)
            a = a.sum(-1, keepdim=True) / torch.where(weights > 0, weights, 1)
        return a if bias else a[:, :, :-1]

    def _is_marked(self, module: Any, x: Tensor) -> bool:
        """Return whether an input is that of padded sequences."""
        weight: Tensor = getattr(module, self.weight)
        return x.shape[-1] > weight.shape[1]

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        is_cell = isinstance(module, RNNCellBase)
        replacements = CELL_REPLACEMENTS if is_cell else LAYER_REPLACEMENTS
        return intercepted(module, self.weight, record, replacements)


_part = cache(RecurrentRule)  # one object for each, since layers compare them

"""``torch.nn.MultiheadAttention``: the projections of queries, keys and values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from einconv_kfac.curvature.factors.approximation import Approximation, weight_sharing
from einconv_kfac.curvature.layers.attention_projections import (
    BIAS,
    OUTPUT,
    PACKED,
    REPLACEMENTS,
    SEPARATE,
)
from einconv_kfac.curvature.layers.interception import intercepted
from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule, Record
from einconv_kfac.curvature.layers.rules.linear import LinearRule


class _SelfAttention(nn.Module):
    """Self-attention without the attention weights that torch returns beside the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


class _Projections(LayerRule):
    """Queries, keys and values as channel groups.

    A call's output is ``[n, l, (3 co)]``; if there are other numbers of keys than of queries, the
    shorter ones end with zeros.
    """

    def accepts(self, module: nn.MultiheadAttention, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim == 4

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return torch.unflatten(gradient.mT, 1, (3, -1))

    def positions(self, module: Any, y_shape: Sequence[int]) -> int:
        """See `LayerRule`."""
        return y_shape[1]

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        return intercepted(module, self.weight, record, REPLACEMENTS)


class AttentionRule(_Projections):
    """Three channel groups: queries, keys and values. The output projection is a layer itself.

    A call's input is ``[n, 3, l, d]``. If there are other numbers of keys than of queries, it is
    ``[n, 3, l, (d 1)]``, whose last entry is 1 for the ``l_g`` positions of a group and 0 for the
    others. With ``"expand"``, ``A`` is then multiplied and ``B`` divided by ``l / l_g``, so that
    their product is that of a layer with ``l_g`` positions; several calls are weighted by ``l``.

    Weights for other numbers of features are three layers, and their bias is a fourth.
    """

    kinds = (nn.MultiheadAttention,)
    examples = (
        LayerExample(_SelfAttention, (3, 5, 4)),
        LayerExample(lambda: _SelfAttention(bias=False), (3, 2, 4)),
    )
    weight, bias = PACKED, BIAS
    revealed = (NonDynamicallyQuantizableLinear,)  # the type of the output projection

    def parts(self, module: nn.MultiheadAttention) -> tuple[LayerRule, ...]:
        """See `LayerRule`."""
        if module._qkv_same_embed_dim:
            return (self,)
        bias = () if module.in_proj_bias is None else (_bias_rule(),)
        return (*map(_projection_rule, SEPARATE), *bias)

    def reveal(self, module: nn.MultiheadAttention, inner: nn.Module) -> LayerRule:
        """See `LayerRule`."""
        return _OutputProjectionRule(module)

    def split(self, module: nn.MultiheadAttention) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (3, module.embed_dim, module.embed_dim), (0, 1, 2)

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return x[..., : module.embed_dim].mT

    def input_sums(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`; with other numbers of keys, ``l / l_g`` times the sums."""
        sums = self.inputs(module, x, y_shape).sum(-1, keepdim=True)
        return sums if _has_one_length(module, x) else sums * _ratios(x)

    def may_join(self, module: Any, x: Tensor) -> bool:
        """See `LayerRule`; ratios of lengths are those of the call."""
        return _has_one_length(module, x)

    def columns(
        self,
        module: Any,
        x: Tensor,
        y_shape: Sequence[int],
        approximation: Approximation,
        bias: bool,
    ) -> Tensor:
        """See `LayerRule`."""
        if _has_one_length(module, x):
            return super().columns(module, x, y_shape, approximation, bias)
        a = (x if bias else x[..., :-1]).mT
        weight = _ratios(x) if approximation == "reduce" else _ratios(x).sqrt()
        return weight_sharing(approximation).inputs(a * weight)


class _ProjectionRule(LinearRule):
    """A weight for another number of features; the bias is a layer of its own.

    Args:
        weight: Its name.
    """

    kinds = ()

    def __init__(self, weight: str) -> None:
        self.weight, self.bias = weight, ""

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        return intercepted(module, self.weight, record, REPLACEMENTS)


class _BiasRule(_Projections):
    """The bias of three weights, as the weight of a constant 1 in three channel groups."""

    weight, bias = BIAS, ""

    def split(self, module: nn.MultiheadAttention) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (3, module.embed_dim, 1), (0, 1, 2)

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return x.mT


class _OutputProjectionRule(LinearRule):
    """The output projection, whose calls are those of the attention.

    Args:
        attention: The attention, to which no reference is kept.
    """

    kinds = ()

    def __init__(self, attention: nn.MultiheadAttention) -> None:
        self._attention = ref(attention)

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        attention = self._attention()
        assert attention is not None
        return intercepted(attention, OUTPUT, record, REPLACEMENTS)


_projection_rule = cache(_ProjectionRule)  # one object for each, since layers compare them
_bias_rule = cache(_BiasRule)


def _has_one_length(module: Any, x: Tensor) -> bool:
    """Return whether there are as many keys as queries."""
    return x.shape[-1] == int(module.embed_dim)


def _ratios(x: Tensor) -> Tensor:
    """Return ``l / l_g`` of an input ``[n, 3, l, (d 1)]``, ``[3, 1, 1]``."""
    return x.shape[2] / x[0, :, :, -1].sum(-1).clamp(min=1)[:, None, None]

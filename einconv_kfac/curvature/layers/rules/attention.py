"""The input projections of ``torch.nn.MultiheadAttention``: queries, keys and values.

Torch applies them inside a function, where module hooks are not called. While a module is
watched, its forward pass is therefore replaced by one of the same value that records the input
projections and calls the output projection as a module.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule, Record


class _SelfAttention(nn.Module):
    """Self-attention without the attention weights that torch returns beside the result."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.attention(x, x, x)[0]
        return result


class AttentionRule(LayerRule):
    """Three channel groups: queries, keys and values. The output projection is a layer itself.

    A call's input is ``[n, 3, l, d]``, its output ``[n, l, (3 co)]``.
    """

    kinds = (nn.MultiheadAttention,)
    examples = (
        LayerExample(_SelfAttention, (3, 5, 4)),
        LayerExample(lambda: _SelfAttention(bias=False), (3, 2, 4)),
    )
    preconditioned = False  # the optimizer does not replace forward passes
    weight, bias = "in_proj_weight", "in_proj_bias"
    revealed = (NonDynamicallyQuantizableLinear,)  # the type of the output projection

    def split(self, module: nn.MultiheadAttention) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (3, module.embed_dim, module.embed_dim), (0, 1, 2)

    def refusal(self, module: nn.MultiheadAttention) -> str | None:
        """See `LayerRule`."""
        extended = module.bias_k is not None or module.add_zero_attn
        return "attention with bias_k or add_zero_attn is not supported" if extended else None

    def accepts(self, module: nn.MultiheadAttention, x: Tensor) -> bool:
        """See `LayerRule`."""
        return x.ndim == 4

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return x.mT

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return torch.unflatten(gradient.mT, 1, (3, -1))

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        module.forward = partial(_attend, module, record)
        return partial(delattr, module, "forward")


def _attend(
    module: nn.MultiheadAttention,
    record: Record,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Return what the module's own forward pass returns, and record the projections."""
    swap = not module.batch_first and query.ndim == 3
    inputs = [x.transpose(0, 1) if swap else x for x in (query, key, value)]
    if query.ndim != 3 or inputs[0].shape != inputs[1].shape:
        raise ValueError(
            f"Curvature of MultiheadAttention takes batches of queries and keys of one length, got "
            f"{list(query.shape)} and {list(key.shape)}. Freeze its in_proj_weight to leave it out."
        )
    y = _projected(module, inputs)
    record(torch.stack(inputs, dim=1), y)
    heads = [torch.unflatten(part, -1, (module.num_heads, -1)) for part in y.chunk(3, dim=-1)]
    q, k, v = (part.transpose(1, 2) for part in heads)  # n h l d
    scores = q @ k.mT * q.shape[-1] ** -0.5
    for mask in _masks(module, attn_mask, key_padding_mask, len(q)):
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    weights = functional.dropout(scores.softmax(dim=-1), module.dropout, module.training)
    result: Tensor = module.out_proj((weights @ v).transpose(1, 2).flatten(2))
    shown = weights.mean(dim=1) if average_attn_weights else weights
    return result.transpose(0, 1) if swap else result, shown if need_weights else None


def _projected(module: nn.MultiheadAttention, inputs: Sequence[Tensor]) -> Tensor:
    """Return queries, keys and values side by side, ``[n, l, (3 d)]``."""
    weight, bias = module.in_proj_weight, module.in_proj_bias
    if all(x is inputs[0] for x in inputs):
        return functional.linear(inputs[0], weight, bias)
    weights = weight.chunk(3)
    biases = [None] * 3 if bias is None else bias.chunk(3)
    return torch.cat([functional.linear(*parts) for parts in zip(inputs, weights, biases)], dim=-1)


def _masks(
    module: nn.MultiheadAttention, mask: Tensor | None, padding: Tensor | None, batch: int
) -> list[Tensor]:
    """Return masks that broadcast to scores ``[n, h, l, l']``."""
    masks = []
    if mask is not None:
        masks.append(
            mask if mask.ndim == 2 else mask.reshape(batch, module.num_heads, *mask.shape[1:])
        )
    if padding is not None:
        masks.append(padding[:, None, None, :])
    return masks

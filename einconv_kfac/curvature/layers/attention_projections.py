"""The projections of ``torch.nn.MultiheadAttention``, recorded.

Torch applies them inside ``functional.multi_head_attention_forward``, where module hooks are not
called. While its calls are recorded, the module runs torch's own code of that function with
other projections, which are recorded. Masks, dropout and attention itself are torch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from einconv_kfac.curvature.layers.interception import Records
from einconv_kfac.curvature.layers.layer_rule import Record

PACKED, BIAS, OUTPUT = "in_proj_weight", "in_proj_bias", "out_proj"
SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


def _attend(
    module: Any, records: Records, function: Any, query: Tensor, *args: Any, **kwargs: Any
) -> Any:
    """Return what torch's function returns, and record the projections.

    Args:
        module: The attention.
        records: Takes the calls of its weights.
        function: ``multi_head_attention_forward``.
        query: The queries, ``[l, n, d]`` or ``[l, d]``.
        args: The other arguments.
        kwargs: The keyword arguments.
    """
    examples = query.shape[1] if query.ndim == 3 else 1
    own: dict[str, Any] = {
        "has_torch_function": lambda _: False,
        "_in_projection": partial(_separately_projected, records),
    }
    if PACKED in records:
        own["_in_projection_packed"] = partial(_projected, records[PACKED])
    if OUTPUT in records:
        own["linear"] = partial(_output_projection, records[OUTPUT], examples)
    return _with_globals(function, own)(query, *args, **kwargs)


def _with_globals(function: Any, own: dict[str, Any]) -> Any:
    """Return a function of torch whose code finds other functions under some names."""
    names = {**function.__globals__, **own}
    result = FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    result.__kwdefaults__ = function.__kwdefaults__
    return result


def _output_projection(
    record: Record, examples: int, x: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """Return the output ``[(l n), d]`` of the output projection, and record it."""
    x, y = (
        torch.unflatten(rows, 0, (-1, examples)).transpose(0, 1)
        for rows in (x, functional.linear(x, weight, bias))
    )
    record(x, y)
    return y.transpose(0, 1).flatten(0, 1)


def _projected(
    record: Record,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return the projections ``[l, n, d]`` of inputs ``[l, n, d]``, and record them as one call."""
    inputs = [x.transpose(0, 1) for x in (query, key, value)]
    if query is key and key is value:
        y = functional.linear(query, weight, bias).transpose(0, 1)  # n l (3 d)
        lengths = [y.shape[1]] * 3
    else:
        weights = weight.chunk(3)
        biases = [None] * 3 if bias is None else bias.chunk(3)
        parts = [functional.linear(*each) for each in zip(inputs, weights, biases)]
        y, lengths = _side_by_side(parts), [part.shape[1] for part in parts]
    record(_stacked(inputs, lengths), y)
    return _taken_apart(y, lengths)


def _separately_projected(
    records: Records,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *parameters: Tensor | None,
) -> tuple[Tensor, ...]:
    """Return the projections ``[l, n, d]`` of inputs ``[l, n, d_g]``; each weight has a call."""
    inputs = [x.transpose(0, 1) for x in (query, key, value)]
    weights, biases = parameters[:3], parameters[3:] or (None,) * 3
    parts = []
    for name, x, weight, bias in zip(SEPARATE, inputs, weights, biases):
        assert weight is not None
        parts.append(functional.linear(x, weight, bias))
        if name in records:
            records[name](x, parts[-1])
    if BIAS not in records:
        return tuple(part.transpose(0, 1).contiguous() for part in parts)
    y, lengths = _side_by_side(parts), [part.shape[1] for part in parts]
    records[BIAS](y.new_ones(y.shape[0], 3, y.shape[1], 1), y)
    return _taken_apart(y, lengths)


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """Return tensors ``[n, l_g, d]`` as one, ``[n, l, (g d)]``; the shorter end with zeros."""
    length = max(part.shape[1] for part in parts)
    return torch.cat([_lengthened(part, length) for part in parts], -1)


def _taken_apart(y: Tensor, lengths: Sequence[int]) -> tuple[Tensor, ...]:
    """Return the parts ``[l_g, n, d]`` of ``y [n, l, (g d)]``."""
    parts = zip(y.chunk(len(lengths), dim=-1), lengths)
    return tuple(part[:, :length].transpose(0, 1).contiguous() for part, length in parts)


def _stacked(inputs: Sequence[Tensor], lengths: Sequence[int]) -> Tensor:
    """Return inputs ``[n, l_g, d]`` as one, see `AttentionRule`."""
    length = max(lengths)
    if min(lengths) < length:
        inputs = [
            _lengthened(torch.cat([x, torch.ones_like(x[..., :1])], -1), length) for x in inputs
        ]
    return torch.stack(list(inputs), dim=1)


def _lengthened(x: Tensor, length: int) -> Tensor:
    """Return ``x [n, l_g, d]`` with zeros at its end, ``[n, l, d]``."""
    return x if x.shape[1] == length else functional.pad(x, (0, 0, 0, length - x.shape[1]))


REPLACEMENTS = {"multi_head_attention_forward": _attend}

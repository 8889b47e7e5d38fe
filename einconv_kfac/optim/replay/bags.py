"""Embeddings with the forward-mode derivatives of torch's backward passes, and bags of them."""

from __future__ import annotations

import math
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, pad

from einconv_kfac.optim.replay.substitution import Forwards


def native_embeddings(modules: Collection[nn.Module]) -> Forwards:
    """Return forward methods of embeddings among modules, and of bags of them, as below."""
    return _bags(modules) | _padded_embeddings(modules)


def _bags(modules: Collection[nn.Module]) -> Forwards:
    """Return forward methods of bags of embeddings, made of a look-up and a reduction.

    torch's operator for bags has no forward mode and can be differentiated only once. Bags whose
    options change the weight or its gradient are left alone.
    """
    return {
        module: partial(_reduced, module)
        for module in modules
        if type(module) is nn.EmbeddingBag and module.max_norm is None
        if not module.scale_grad_by_freq
    }


def _padded_embeddings(modules: Collection[nn.Module]) -> Forwards:
    """Return forward methods of embeddings whose row of the padding has no tangent.

    Torch's backward pass leaves that row out, and its forward mode does not. The row has a tangent
    where the weight is used elsewhere, as by an output layer, or decays.
    """
    return {
        module: partial(_without_padding, module)
        for module in modules
        if type(module) is nn.Embedding and module.max_norm is None
        if module.padding_idx is not None
    }


def _without_padding(module: Any, input: Tensor) -> Tensor:  # noqa: A002 (as torch calls it)
    """Return the output of ``torch.nn.Embedding``, whose padding is constant."""
    output: Tensor = type(module).forward(module, input)
    constant = embedding(input, module.weight.detach())
    return constant.where((input == module.padding_idx)[..., None], output)


def _reduced(
    module: Any,
    input: Tensor,  # noqa: A002 (as torch calls it)
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Return the output of ``torch.nn.EmbeddingBag``, ``[n, e]``; see there for the arguments."""
    if input.is_nested:  # torch's own, which is refused
        output: Tensor = type(module).forward(module, input, offsets, per_sample_weights)
        return output
    indices, is_there, weights = _padded(module, input, offsets, per_sample_weights)
    entries = embedding(indices, module.weight)  # n k e
    if module.mode == "max":
        hidden = entries.masked_fill(~is_there[..., None], -math.inf)
        hidden = torch.cat([hidden, torch.full_like(hidden[:, :1], -math.inf)], dim=1)
        largest = hidden.max(dim=1).values
        return largest.masked_fill(~is_there.any(dim=1)[:, None], 0.0)
    there = is_there.to(entries.dtype)
    factors = there if weights is None else there * weights
    total = (entries * factors[..., None]).sum(dim=1)
    if module.mode == "mean":
        return total / there.sum(dim=1).clamp_min(1)[:, None]
    return total


def _padded(
    module: Any, given: Tensor, offsets: Tensor | None, weights: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return indices ``[n, k]`` of bags of up to ``k`` entries, which of them count, and weights.

    Entries with the padding's index do not count.
    """
    if offsets is None:
        indices, is_there = given, torch.ones_like(given, dtype=torch.bool)
    else:
        last = offsets[:0] if module.include_last_offset else offsets.new_tensor([len(given)])
        ends = torch.cat([offsets, last])
        steps = torch.arange(int(ends.diff().max()) if len(ends) > 1 else 0, device=given.device)
        is_there = steps < ends.diff()[:, None]
        places = (ends[:-1, None] + steps).clamp_max(len(given))
        indices = pad(given, (0, 1))[places]
        weights = None if weights is None else pad(weights, (0, 1))[places]
    if module.padding_idx is not None:
        is_there = is_there & (indices != module.padding_idx)
    return indices, is_there, weights

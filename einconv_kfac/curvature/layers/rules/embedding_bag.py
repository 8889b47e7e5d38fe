"""``torch.nn.EmbeddingBag``: a linear layer whose inputs count the entries of a bag."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.layer_rule import LayerExample, LayerRule, Record
from einconv_kfac.curvature.module_hooks import PartialHook, is_compiling

LARGEST_BAG_VOCABULARY = 8192
"""Number of embeddings above which the inputs ``[n, d]`` need too much memory."""


class EmbeddingBagRule(LayerRule):
    """Recorded inputs are ``[n, d]``: how often, or with which weight, a bag has each entry."""

    kinds = (nn.EmbeddingBag,)
    examples = (
        LayerExample(lambda: nn.EmbeddingBag(5, 3), (4, 6), classes=5),
        LayerExample(lambda: nn.EmbeddingBag(5, 3, mode="sum"), (3, 2), classes=5),
    )

    def split(self, module: nn.EmbeddingBag) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """See `LayerRule`."""
        return (1, *module.weight.shape), (0, 2, 1)

    def refusal(self, module: nn.EmbeddingBag) -> str | None:
        """See `LayerRule`."""
        if module.mode == "max":
            return "mode='max' is not linear in the weight"
        if module.num_embeddings > LARGEST_BAG_VOCABULARY:
            return f"more than {LARGEST_BAG_VOCABULARY} embeddings need too large a factor"
        return (
            None if module.max_norm is None else "max_norm changes the weight in the forward pass"
        )

    def watch(self, module: Any, record: Record) -> Callable[[], None]:
        """See `LayerRule`."""
        hook = PartialHook(_record_bags, record)
        handle = module.register_forward_hook(hook, prepend=True, with_kwargs=True)
        end: Callable[[], None] = handle.remove
        return end

    def inputs(self, module: Any, x: Tensor, y_shape: Sequence[int]) -> Tensor:
        """See `LayerRule`."""
        return x[:, None, :, None]

    def outputs(self, module: Any, gradient: Tensor) -> Tensor:
        """See `LayerRule`."""
        return gradient[:, None, :, None]


def _record_bags(
    record: Record, module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], output: Tensor
) -> None:
    """Record the entries and the output of a call, as a forward hook."""
    if getattr(record, "is_active", True) and not is_compiling():
        given = {**dict(zip(("input", "offsets", "per_sample_weights"), inputs)), **keywords}
        record(_bags(module, given.pop("input"), **given), output)


@torch.no_grad()
def _bags(
    module: Any,
    indices: Tensor,
    offsets: Tensor | None = None,
    per_sample_weights: Tensor | None = None,
) -> Tensor:
    """Return the entries of bags, ``[n, d]``, with which the weight is multiplied."""
    entries = indices.reshape(-1).long()
    if offsets is None:
        count, bag = len(indices), torch.arange(len(indices), device=indices.device)
        bag = bag.repeat_interleave(indices.shape[1])
    else:
        count = len(offsets) - int(module.include_last_offset)
        places = torch.arange(len(entries), device=indices.device)
        bag = torch.searchsorted(offsets[:count].contiguous(), places, right=True) - 1
    ones = torch.ones_like(entries, dtype=module.weight.dtype)
    weights = ones if per_sample_weights is None else per_sample_weights.reshape(-1)
    if module.padding_idx is not None:
        kept = entries != module.padding_idx
        entries, bag, weights, ones = entries[kept], bag[kept], weights[kept], ones[kept]
    result = torch.zeros(count, module.num_embeddings, dtype=weights.dtype, device=indices.device)
    result.index_put_((bag, entries), weights, accumulate=True)
    if module.mode == "mean":
        result /= result.new_zeros(count).index_add_(0, bag, ones).clamp(min=1)[:, None]
    return result

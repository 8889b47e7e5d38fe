"""The weight of the losses of each layer, over the batches of all workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from einconv_kfac.distributed.workers import Workers
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.vectors import sum_of

MIXED_SIGNS = (
    "All losses of a step must have weights of the same sign, got {} and {}, whose curvature is a "
    "difference and may have no inverse. Pass the whole loss to `observe`, before "
    "`loss.backward()`: `loss = optimizer.observe(first - second)`."
)


@dataclass(frozen=True)
class LayerWeights:
    """The weight of the losses of each layer.

    Args:
        by_layer: The factors of the curvature that is averaged over batches.
        is_void: Whether all losses of this worker have the weight zero, and not all of others.
    """

    by_layer: Mapping[str, Tensor]
    is_void: bool


def layer_weights(
    batches: Sequence[Batch], layers: Sequence[str], sums: bool, workers: Workers
) -> LayerWeights:
    """Return the factor of the curvature that is averaged over batches, by layer.

    The objective is the weighted sum of the losses, and the mean of that over workers. Factors
    average the curvature of means over the batches that depend on the layer, and add that of sums.
    Batches of weight zero count only if no worker has others.

    Args:
        batches: The batches of a step.
        layers: Names of the layers whose factors are due.
        sums: Whether the losses are sums over examples, not means.
        workers: The workers, each with batches of its own.

    Raises:
        RuntimeError: If weights are positive on one worker and negative on another.
    """

    def averaged(total: Tensor, count: float | Tensor) -> Tensor:
        return total / (count * workers.size) if sums else total

    every = [batch for batch in batches if batch.layers]
    others = [batch for batch in every if not _is_zero(batch.weight)]
    counts = [n for own in (every, others) for n in (len(own), _are_common(own, layers))]
    own = [_total(every), *counts, *(_by_sign(every) if workers.size > 1 else ())]
    total, *found = workers.means(own, "weight of the losses")
    _check_signs(found[4:], workers.size)
    (count, common), present, is_void = found[:2], every, False
    if found[2] > 0:
        (count, common), present, is_void = found[2:4], others, bool(every and not others)
    if common == 1:
        return LayerWeights(dict.fromkeys(layers, averaged(total, count)) if count else {}, is_void)
    by_layer = [[batch for batch in present if name in batch.layers] for name in layers]
    own = [*map(_total, by_layer), *map(len, by_layer)]
    means = workers.means(own, "weights of the losses of each layer")
    pairs = zip(layers, means, means[len(layers) :])
    return LayerWeights({name: averaged(t, count) for name, t, count in pairs if count}, is_void)


def _is_zero(weight: Tensor) -> bool:
    """Return whether a weight is zero; the host reads it on a CPU only."""
    return weight.is_cpu and not float(weight)


def _are_common(batches: Sequence[Batch], layers: Sequence[str]) -> float:
    """Return 1 if all batches depend on all layers, else 0."""
    return float(all(batch.layers.issuperset(layers) for batch in batches))


def _total(batches: Sequence[Batch]) -> Tensor | float:
    """Return the sum of the weights of batches."""
    return sum_of([batch.weight.abs() for batch in batches]) if batches else 0.0


def _by_sign(batches: Sequence[Batch]) -> Sequence[Tensor | float]:
    """Return the sums of positive and of negative weights."""
    weights = [batch.weight for batch in batches]
    if not weights:
        return 0.0, 0.0
    return sum_of([w.clamp_min(0) for w in weights]), sum_of([w.clamp_max(0) for w in weights])


def _check_signs(means: Sequence[Tensor], size: int) -> None:
    """Raise a ``RuntimeError`` if neither of the means of `_by_sign` over workers is zero."""
    if means and all(float(mean) for mean in means):
        positive, negative = (f"{float(mean) * size:.6g}" for mean in means)
        raise RuntimeError(MIXED_SIGNS.format(f"sums over workers of {positive}", negative))

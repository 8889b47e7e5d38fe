"""The weights of the losses of one step in the factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.evaluation import Evaluation, RuleEvaluation
from einconv_kfac.curvature.estimation.fisher import FisherEstimator
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.distributed.workers import Workers
from einconv_kfac.optim.factors.accumulator import LayerSums
from einconv_kfac.optim.factors.batch_shares import BatchShares, Number
from einconv_kfac.optim.factors.layer_weights import MIXED_SIGNS, layer_weights
from einconv_kfac.optim.factors.weighted_evaluation import WeightedEvaluation
from einconv_kfac.optim.replay.batch import Batch
from einconv_kfac.optim.replay.loss_input import REDUCTIONS
from einconv_kfac.optim.vectors import precise

ROOT = (
    "The square root of the ratio of two losses' weights, which must have the same sign (pass the "
    "whole loss to `observe`),"
)
SMALLEST = 2.0**-60
"""What a first weight of zero is replaced by on a device, since the others are relative to it."""


class LossWeights:
    """The weights of the losses of one step, in the sums of factors and in their averages.

    Weights are relative to the first, see `BatchShares`. The host reads them on a CPU only. Several
    workers have no first loss in common; their weights are absolute.

    Args:
        estimator: Which Fisher of which loss.
        workers: The workers that collect together.

    Attributes:
        current: The weight of the last loss.
        begins_anew: Whether all losses before it had the weight zero, and contribute nothing.
        roots: Square roots of relative weights that the host has not read.
    """

    def __init__(self, estimator: FisherEstimator, workers: Workers) -> None:
        self._estimator, self._workers = estimator, workers
        self.begin_()

    @property
    def _is_absolute(self) -> bool:
        """Whether weights are not relative to that of the first loss."""
        return self._workers.size > 1 and self._estimator.fisher != "forward-only"

    def begin_(self) -> None:
        """Begin a step without losses."""
        self.current: Number = 1.0
        self.begins_anew = False
        self._first: Number | None = None
        self._mixed: tuple[float, float] | None = None
        self._scaler: Number = 1.0
        self._by_layer: Mapping[str, Tensor] = {}
        self._recorded_sums: bool | None = None
        self.roots: list[Tensor] = []

    @property
    def _sums(self) -> bool:
        """Whether the losses are sums over examples, not means, as when they were recorded."""
        recorded = self._recorded_sums
        return is_sum(self._estimator.loss_fn) if recorded is None else recorded

    def shares(self) -> BatchShares:
        """Return the shares of batches in the sums of a layer, before the first."""
        return BatchShares(self._sums, self._is_absolute)

    def next_(self, weight: Tensor, evaluation: Evaluation) -> Evaluation | None:
        """Take the next loss, and return it; ``None`` if it contributes nothing.

        Args:
            weight: The derivative of the objective with respect to the loss.
            evaluation: The loss, whose weight is in its vectors if the host does not read it.

        Raises:
            RuntimeError: If losses of the step are means and sums.
        """
        self._keep_reduction_(evaluation)
        is_read = weight.is_cpu and not isinstance(self._first, Tensor)
        own = self._known_(float(weight)) if is_read else self._unread_(weight)
        if own is None:
            return None
        self.current = own
        if not isinstance(own, Tensor):
            return evaluation
        self.roots.append(own.sqrt())
        return WeightedEvaluation(evaluation, self.roots[-1])

    def _keep_reduction_(self, evaluation: Evaluation) -> None:
        """Keep the reduction of a loss; it may change once the step has been taken.

        Raises:
            RuntimeError: If it differs from that of an earlier loss, or has changed since the call.
        """
        found = {is_sum(self._estimator.loss_fn)}
        if isinstance(evaluation, RuleEvaluation):
            found.add(is_sum(evaluation.loss_fn))
        if self._recorded_sums is not None:
            found.add(self._recorded_sums)
        if len(found) > 1:
            raise RuntimeError(REDUCTIONS)
        (self._recorded_sums,) = found

    def _known_(self, weight: float) -> float | None:
        """Return the weight of a loss by the first, which the host has read.

        Weights of zero count until there is another.
        """
        assert not isinstance(self._first, Tensor)
        self.begins_anew = self._first == 0 != weight
        if weight == 0 and self._first:
            return None
        if self._first is None or self.begins_anew:
            self._first = weight
        if weight * self._first < 0:
            self._mixed = self._mixed or (self._first, weight)
        if self._is_absolute:
            return abs(weight)
        return abs(weight / self._first) if weight else 1.0

    def _unread_(self, weight: Tensor) -> Number:
        """Return the weight of a loss by the first, which the host has not read."""
        if self._is_absolute:
            return weight.abs()
        if self._first is None:
            self._first = weight
            return 1.0
        dtype = precise(weight.dtype)
        first = torch.as_tensor(self._first, dtype=dtype, device=weight.device)
        return weight.to(dtype) / first.where(first.abs() >= SMALLEST, SMALLEST)

    def check(self) -> None:
        """Raise a ``RuntimeError`` if the host has read weights of both signs."""
        if self._mixed is not None:
            raise RuntimeError(MIXED_SIGNS.format(*(f"{own:.6g}" for own in self._mixed)))

    def find_(self, batches: Sequence[Batch], due: Sequence[str], scaler: Number = 1.0) -> bool:
        """Find the weight of the losses of each layer.

        Args:
            batches: The batches of the step.
            due: Names of the layers whose factors are due, in the order of all workers.
            scaler: The factor that the batches' weights were divided by since they were recorded.

        Returns:
            Whether all losses of this worker have the weight zero, and not all of others.

        Raises:
            RuntimeError: If weights are positive on one worker and negative on another.
        """
        found = layer_weights(batches, due, self._sums, self._workers)
        self._by_layer, self._scaler = found.by_layer, self._shared(scaler, bool(batches))
        return found.is_void

    def _shared(self, scaler: Number, is_known: bool) -> Number:
        """Return the factor of the workers that have batches, for those that have none.

        Args:
            scaler: See `find_`.
            is_known: Whether this worker has batches.
        """
        if not self._is_absolute or self._workers.size == 1:
            return scaler
        own = [scaler * float(is_known), float(is_known)]
        total, count = self._workers.means(own, "factor in the weights")
        return cast("Tensor", total / count) if count else scaler

    def scales(self, moments: Mapping[str, LayerSums]) -> dict[str, tuple[float, Tensor | None]]:
        """Return by what the averages of layers are multiplied: a number, and one on the device.

        Layers with the same number on the device have the same tensor.

        Args:
            moments: What was collected, by layer.
        """
        if self._is_absolute:
            size, inverse = float(self._workers.size), None
            if isinstance(self._scaler, Tensor):
                inverse = self._scaler.reciprocal()
            else:
                size *= self._scaler
            return {name: (own.examples / size, inverse) for name, own in moments.items()}
        found: dict[tuple[object, ...], Tensor] = {}
        scales: dict[str, tuple[float, Tensor | None]] = {}
        for name, own in moments.items():
            weight = self._by_layer.get(name)
            if weight is not None and self._estimator.fisher != "forward-only":
                key = id(weight), *own.shares.key(own.examples)
                if key not in found:
                    found[key] = _times(weight, own.shares.correction(own.examples))
                weight = found[key]
            scales[name] = (float(own.examples) if self._sums else 1.0), weight
        return scales


def _times(weight: Tensor, factor: Number) -> Tensor:
    """Return a weight times a factor; one that is known to be 1 takes no operation."""
    if isinstance(factor, Tensor):
        return weight * factor.to(weight)
    return weight if factor == 1 else weight * factor

"""How much each batch of a step counts in the sums of a layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor

Number: TypeAlias = float | Tensor
"""A number, or one on a device that the host has not read."""


class BatchShares:
    """The shares of batches in the sums from which a layer's output factor is averaged.

    A loss of weight ``w`` over ``n`` examples gives each of them the weight ``v = w / n`` if it is
    a mean, and ``v = w`` if it is a sum. Let ``P_k`` be the sum over batch ``k`` of the outer
    products of gradients ``g`` of the examples' own losses, of ``N`` examples with ``T`` uses of
    the layer's weight in all. The Gauss-Newton matrix of ``sum_k w_k L_k`` is ``sum_k w_k G_k``.
    Its factors are::

        B = N / T sum_k v_k P_k,   A = 1 / N sum a a^T

    For means with the same number of uses in all examples this is ``B = sum_k w_k B_k``. Martens
    and Grosse (2015) take ``a`` to be independent of ``g``; here it is independent of ``v g g^T``,
    so that the inputs of all examples count alike. The factors are then those of all examples in
    one batch whose loss has the weights inside, however the sum is divided into losses.

    The share of a batch is its weight per example by that of the first. Equal batches are added
    without a multiplication.

    Args:
        is_sum: Whether the losses are sums over examples, not means.
        is_absolute: Whether the first weight per example is taken to be 1, so that several workers
            can add up their sums.

    Attributes:
        share: The share of the batch that is being added, up to a factor of its gradients.
        total: The sum of the weights of all batches, by the first.
    """

    def __init__(self, is_sum: bool = False, is_absolute: bool = False) -> None:
        self._is_sum, self._is_absolute = is_sum, is_absolute
        self._weight: Number = 1.0
        self._first: tuple[float, int] | None = None
        self._batches = 0
        self.share = 1.0
        self.total: Number = 0.0

    def begin_(self, weight: Number) -> None:
        """Begin a batch.

        Args:
            weight: The weight of its loss. One that the host has not read is in its gradients.
        """
        self._weight = weight

    def count_(self, examples: int) -> None:
        """Count the examples of the batch, which is added now."""
        known = 1.0 if isinstance(self._weight, Tensor) else self._weight
        size = 1 if self._is_sum else max(examples, 1)
        if self._is_absolute:
            self._first = 1.0, 1
        first, first_size = self._first = self._first or (known, size)
        self.share = known / first * (first_size / size)
        self.total = self.total + self._weight / first
        self._batches += 1

    def snapshot(self) -> Callable[[], None]:
        """Return a function that takes back what is counted from now on."""
        known = dict(vars(self))
        return lambda: vars(self).update(known)

    def key(self, examples: int) -> tuple[object, ...]:
        """Return what the correction depends on."""
        total = id(self.total) if isinstance(self.total, Tensor) else self.total
        return total, self._count(examples)

    def correction(self, examples: int) -> Number:
        """Return the factor of the average over all examples: 1 where all batches count alike.

        The average is multiplied by the sum of the weights, or by their mean for sums.

        Args:
            examples: The number of examples.
        """
        return self._count(examples) / self.total

    def _count(self, examples: int) -> float:
        """Return the number of batches, as many as there would be of the first one's size."""
        if self._is_sum:
            return float(self._batches)
        return 1.0 if self._first is None else examples / self._first[1]

"""Sums over examples from which a layer's Kronecker factors are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.factor_sums import (
    DEFAULT_MAX_FACTOR_SIZE,
    FactorSums,
    united,
)
from einconv_kfac.curvature.estimation.weight_gradients import WeightSums
from einconv_kfac.curvature.factors.approximation import Approximation
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.summable import SumPart


class Moments(Protocol):
    """Sums over the examples of several batches, for one layer."""

    @property
    def needs_examples(self) -> bool:
        """Whether it matters which rows belong to which example, beyond sums over all rows."""

    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """Add the inputs of one batch.

        Args:
            calls: All calls of the layer on which the loss of this batch depends.
            examples: The number of examples, if it is not the size of each call's input.
            weight: The number by which a call's mean over its first dimension is multiplied, if it
                is not that of the examples.
        """

    def snapshot(self) -> Callable[[], None]:
        """Return a function that takes back the inputs that are added from now on."""

    def add_gradients_(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor],
        scale: float,
        are_alone: Sequence[bool] = (),
    ) -> None:
        """Add the gradients of one batch along one or several root vectors, after `add_inputs_`.

        Args:
            calls: See `add_inputs_`.
            gradients: For each call, the gradients at its output, those of the second root vector
                behind those of the first: ``[v n, ...]`` for a call with ``n`` examples.
            scale: Factor of the outer products of the gradients.
            are_alone: Whether each root vector is of one unit of the loss, see `Root`. The parts of
                all examples belong together then. None is by default.
        """

    def add_examples_(self, examples: int) -> None:
        """Add the number of examples of one batch, instead of `add_inputs_`."""

    def add_weight_gradient_(self, gradient: Tensor, scale: float) -> None:
        """Add a gradient of the weight itself, for weights that are used past the calls.

        Args:
            gradient: The gradient ``[g, co, d]`` of one example.
            scale: Factor of its outer product.
        """


class LayerMoments:
    """Second moments of a layer's inputs and output gradients, summed over batches.

    A layer that is tied to one that multiplies with the transposed matrix, as an embedding is to
    an output layer, has moments for either use. Its factors are those of the one Kronecker
    product that has the partial traces of the sum of both (see `united`).

    Args:
        layer: The layer.
        approximation: ``"expand"`` or ``"reduce"``.
        max_factor_size: Number of rows above which a factor is replaced by its diagonal.
    """

    def __init__(
        self,
        layer: Layer,
        approximation: Approximation,
        max_factor_size: int = DEFAULT_MAX_FACTOR_SIZE,
    ) -> None:
        self.layer = layer
        self.approximation = approximation
        self._sums = {
            transposed: FactorSums(layer, approximation, max_factor_size, transposed)
            for transposed in ((False, True) if layer.is_tied else (False,))
        }
        self._weight = WeightSums()
        self._weight_examples = 0

    @property
    def needs_examples(self) -> bool:
        """See `Moments`."""
        return self.approximation == "reduce"

    @property
    def examples(self) -> int:
        """The number of examples so far."""
        return max(self._weight_examples, *(own.examples for own in self._sums.values()))

    @property
    def rows(self) -> int:
        """The number of products of the weight with a vector, of inputs in the layer's calls."""
        return sum(own.rows for own in self._sums.values())

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shapes of ``A`` and ``B``: ``[g, d, d]``, or ``[g, d]`` where one is diagonal."""
        shapes = [own.shapes[::-1] if t else own.shapes for t, own in self._sums.items()]
        return [max(either, key=len) for either in zip(*shapes)]

    @torch.no_grad()
    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """See `Moments`."""
        for sums, own, _ in self._by_use(calls, calls):
            sums.add_inputs_(own, examples, weight)

    def snapshot(self) -> Callable[[], None]:
        """See `Moments`."""
        undo = [sums.snapshot() for sums in self._sums.values()]

        def restore() -> None:
            for each in undo:
                each()

        return restore

    @torch.no_grad()
    def add_gradients_(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor],
        scale: float,
        are_alone: Sequence[bool] = (),
    ) -> None:
        """See `Moments`."""
        for sums, own, their in self._by_use(calls, gradients):
            sums.add_gradients_(own, their, scale)

    def add_examples_(self, examples: int) -> None:
        """See `Moments`."""
        self._weight_examples += examples

    @torch.no_grad()
    def add_weight_gradient_(self, gradient: Tensor, scale: float) -> None:
        """See `Moments`."""
        self._weight.add_(gradient, scale)

    def sums(self) -> list[Tensor]:
        """Return the sums of the factors that were added."""
        totals = [total for own in self._sums.values() for total in (own.inputs, own.outputs)]
        own = self._weight.columns, self._weight.rows
        return [total for total in (*own, *totals) if total is not None]

    def parts(self) -> list[SumPart]:
        """See `Summable`."""
        groups, channels, columns = self.layer.layout.shape
        sizes = (("columns", columns), ("rows", channels))
        weight = [
            SumPart.of(self._weight, name, (groups, size, size), self.layer.device, symmetric=True)
            for name, size in sizes
        ]
        return [*weight, *(part for own in self._sums.values() for part in own.parts())]

    def counts(self) -> list[int]:
        """See `Summable`."""
        own = [count for sums in self._sums.values() for count in sums.counts()]
        return [self._weight_examples, *own]

    def set_counts_(self, counts: Sequence[int]) -> None:
        """See `Summable`."""
        self._weight_examples, *own = counts
        for sums in self._sums.values():
            own_counts, own = own[: len(sums.counts())], own[len(sums.counts()) :]
            sums.set_counts_(own_counts)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return ``A [g, d, d]`` and ``B [g, co, co]``, averaged over what was added.

        A factor that is diagonal is its diagonal, ``[g, d]``. Without gradients, as for a
        forward-only Fisher, ``B`` is the identity.

        Raises:
            RuntimeError: If nothing was added.
            ValueError: If the weight is used past the calls of its layer in some batches only.
        """
        pairs = []
        for transposed, own in self._sums.items():
            if own.inputs is not None:
                inputs, outputs = own.moments()
                pairs.append((outputs, inputs) if transposed else (inputs, outputs))
        if self._weight.rows is not None:
            if pairs:
                raise mixed_uses(self.layer)
            pairs = [self._weight.factors(self.examples)]
        if not pairs:
            raise no_data(self.layer)
        a, b = (_in_form(part, shape) for part, shape in zip(united(pairs), self.shapes))
        return a, b

    def totals(self) -> list[tuple[Tensor, int]]:
        """Return sums and what the means divide them by, of ``A`` and ``B`` where that is all."""
        own = [*self._sums.values()]
        is_plain = len(own) == 1 and self._weight is None and own[0].shapes == self.shapes
        found = own[0].totals() if is_plain else []
        return found if len(found) == len(self.shapes) else []

    def _by_use(
        self, calls: Sequence[LayerCall], others: Sequence[Any]
    ) -> Iterator[tuple[FactorSums, list[LayerCall], list[Any]]]:
        """Yield the calls of each use, with their part of another sequence."""
        for transposed, sums in self._sums.items():
            chosen = [
                (call, other)
                for call, other in zip(calls, others)
                if len(self._sums) == 1 or self.layer.use_of(call.module).transposed == transposed
            ]
            if chosen:
                yield sums, [call for call, _ in chosen], [other for _, other in chosen]


def averaged(several: Sequence[LayerMoments]) -> list[tuple[Tensor, Tensor]]:
    """Return the factors of many layers, see `LayerMoments.factors`; most by one operation."""
    totals = [moments.totals() for moments in several]
    flat = [each for own in totals for each in own]
    means: list[Tensor] = []
    if flat:
        counts = [float(count) for _, count in flat]
        means = list(torch._foreach_div([total for total, _ in flat], counts))
    pairs = iter(zip(means[::2], means[1::2]))
    return [next(pairs) if own else each.factors() for own, each in zip(totals, several)]


def _in_form(factor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return a factor in the form of the layer's, as matrices or as their diagonals."""
    if factor.ndim > len(shape):
        return factor.diagonal(dim1=-2, dim2=-1)
    return torch.diag_embed(factor) if factor.ndim < len(shape) else factor


def no_data(layer: Layer) -> RuntimeError:
    """Return the error for a layer on which no loss depended."""
    return RuntimeError(
        f"Factors of '{layer.name}' need data, got none: there was no batch with a target that "
        "counts, or the loss of none depends on it through calls that record gradients (those of "
        f"a checkpoint do with use_reentrant=False). Leave it out: exclude=['{layer.name}']."
    )


def mixed_uses(layer: Layer) -> ValueError:
    """Return the error for a weight that is used past the calls in some batches only."""
    return ValueError(
        f"The weight of '{layer.name}' must be used in the same way for all batches, got uses past "
        f"the layer's own calls for some only. Leave the layer out: exclude=['{layer.name}']."
    )

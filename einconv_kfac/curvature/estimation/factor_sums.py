"""Sums over examples of second moments, for modules that use a weight in the same way."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.diagonal_factor import sum_of, trace_of
from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.factors.approximation import (
    Approximation,
    second_moment,
    squares,
    weight_sharing,
    with_ones,
)
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.distributed.summable import SumPart

DEFAULT_MAX_FACTOR_SIZE = 8192
"""Largest number of rows of a factor that is not replaced by its diagonal."""
_JOINED_ENTRIES = 1 << 20
"""Largest number of entries of small calls that are computed as one."""


def check_max_factor_size(size: int) -> None:
    """Raise a ``ValueError`` if a largest size of factors is not a positive integer."""
    if not isinstance(size, int) or isinstance(size, bool) or size < 1:
        raise ValueError(f"`max_factor_size` must be a positive integer, got {size!r}.")


def batch_size(layer: Layer, calls: Sequence[LayerCall]) -> int:
    """Return the number of examples of a layer's calls.

    Raises:
        ValueError: If the calls differ in it.
    """
    sizes = sorted({call.x.shape[0] for call in calls})
    if len(sizes) > 1:
        raise ValueError(
            f"All calls of '{layer.name}' must have the same number of examples, got {sizes}. "
            f"Leave it out: exclude=['{layer.name}']."
        )
    return sizes[0]


class FactorSums:
    """Second moments of inputs and output gradients of a layer, summed over batches.

    Args:
        layer: The layer.
        approximation: ``"expand"`` or ``"reduce"``.
        max_factor_size: Number of rows above which a moment is replaced by its diagonal.
        transposed: Whether the calls are those of modules that multiply with the transpose.

    Attributes:
        examples: Number of examples so far.
        rows: Number of vectors that forward passes multiplied by the weight.
    """

    def __init__(
        self,
        layer: Layer,
        approximation: Approximation,
        max_factor_size: int = DEFAULT_MAX_FACTOR_SIZE,
        transposed: bool = False,
    ) -> None:
        self._layer = layer
        self._approximation = approximation
        self._sharing = weight_sharing(approximation)
        groups, rows, columns = layer.layout.shape
        self._sizes = (rows, columns) if transposed else (columns, rows)
        one_hot = all(u.rule.one_hot for u in layer.uses if u.transposed == transposed)
        self._is_diagonal = (
            self._sizes[0] > max_factor_size or (one_hot and approximation == "expand"),
            self._sizes[1] > max_factor_size,
        )
        self.shapes = [
            (groups, size) if diagonal else (groups, size, size)
            for size, diagonal in zip(self._sizes, self._is_diagonal)
        ]
        self.examples = self.rows = 0
        self._terms = 0
        self.inputs: Tensor | None = None
        self.outputs: Tensor | None = None

    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """See `LayerMoments.add_inputs_`."""
        self.examples += calls[0].x.shape[0] if examples is None else examples
        joined = [call for call, _ in self._joined(calls, [call.x for call in calls])]
        for group in self._sharing.joined(joined):
            size = batch_size(self._layer, group)
            if examples is not None:
                size = size // calls[0].x.shape[0] * (weight or examples)
            self._terms += self._sharing.term_count(size, sum(self._positions(group)))
            self.rows += size * sum(
                self._rule(call).products(call.module, call.x, call.y_shape) for call in group
            )
            self.inputs = self._input_factor(group, **_into(self.inputs, size))

    def snapshot(self) -> Callable[[], None]:
        """See `Moments`; the sum is copied, since inputs are added to it in place."""
        known = {**vars(self), "inputs": None if self.inputs is None else self.inputs.clone()}
        return lambda: vars(self).update(known)

    def add_gradients_(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor], scale: float
    ) -> None:
        """See `Moments`."""
        for group in self._sharing.joined(self._joined(calls, gradients)):
            self.outputs = self._output_factor(group, scale)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the moments of inputs and gradients, averaged over what was added.

        They are matrices ``[g, d, d]``, or diagonals ``[g, d]``. Without gradients, as for a
        forward-only Fisher, the second is the identity.
        """
        (inputs, examples), *outputs = self.totals()
        if outputs:
            ((total, terms),) = outputs
            return inputs / examples, total / terms
        identity = inputs.new_ones(self.shapes[1][:2])
        identity = identity if self._is_diagonal[1] else torch.diag_embed(identity)
        return inputs / examples, identity

    def totals(self) -> list[tuple[Tensor, int]]:
        """Return the sums that were added, inputs first, and what the means divide them by."""
        parts = ((self.inputs, self.examples), (self.outputs, self._terms))
        return [(total, count) for total, count in parts if total is not None]

    def parts(self) -> list[SumPart]:
        """See `Summable`."""
        device = self._layer.device
        return [
            SumPart.of(self, name, shape, device, symmetric=not is_diagonal)
            for name, shape, is_diagonal in zip(
                ("inputs", "outputs"), self.shapes, self._is_diagonal
            )
        ]

    def counts(self) -> list[int]:
        """See `Summable`."""
        return [self.examples, self._terms, self.rows]

    def set_counts_(self, counts: Sequence[int]) -> None:
        """See `Summable`."""
        self.examples, self._terms, self.rows = counts

    def _joined(
        self, calls: Sequence[LayerCall], tensors: Sequence[Tensor]
    ) -> list[tuple[LayerCall, Tensor]]:
        """Return calls with tensors like their outputs, small calls of one shape as one.

        Where the positions of all calls are summed, as by ``"reduce"``, they stay apart.
        """
        pairs = list(zip(calls, tensors))
        if len(calls) == 1 or self._approximation != "expand":
            return pairs
        alike: dict[Hashable, list[tuple[LayerCall, Tensor]]] = defaultdict(list)
        for number, (call, own) in enumerate(pairs):
            may_join = self._rule(call).may_join(call.module, call.x)
            key = (call.module, call.x.shape, call.y_shape, len(own)) if may_join else number
            alike[key].append((call, own))
        found: list[tuple[LayerCall, Tensor]] = []
        for group in alike.values():
            count = max(1, _JOINED_ENTRIES // max(1, group[0][0].x.numel() + group[0][1].numel()))
            found += [_as_one(group[i : i + count]) for i in range(0, len(group), count)]
        return found

    def _positions(self, calls: Sequence[LayerCall]) -> list[int]:
        """Return the number of positions of each call."""
        return [self._rule(call).positions(call.module, call.y_shape) for call in calls]

    def _rule(self, call: LayerCall) -> Any:
        """Return the rule of the module that was called."""
        return self._layer.use_of(call.module).rule

    def _input_factor(self, calls: Sequence[LayerCall], **into: Any) -> Tensor:
        """Return the moment of calls whose positions are averaged together, added to a sum."""
        bias, diagonal = self._layer.bias is not None, self._is_diagonal[0]
        if len(calls) == 1:
            (call,) = calls
            rule = self._rule(call)
            factor = rule.input_diagonal if diagonal else rule.input_factor
            result: Tensor = factor(
                call.module, call.x, call.y_shape, self._approximation, bias, **into
            )
            return result
        sums = [self._rule(c).input_sums(c.module, c.x, c.y_shape) for c in calls]
        mean = torch.stack(sums).sum(0) / sum(self._positions(calls))  # [n, g, d, 1]
        columns = with_ones(mean) if bias else mean
        moment = squares if diagonal else second_moment
        return moment(columns, batch_size(self._layer, calls), **into)

    def _output_factor(self, calls: Sequence[tuple[LayerCall, Tensor]], scale: float) -> Tensor:
        """Return the sum of ``scale * g g^T`` over calls whose positions are summed together."""
        diagonal = self._is_diagonal[1]
        if len(calls) == 1:
            ((call, gradient),) = calls
            (positions,) = self._positions([call])
            count = self._sharing.term_count(gradient.shape[0], positions)
            into = _into(self.outputs, scale * count)
            rule = self._rule(call)
            factor = rule.output_diagonal if diagonal else rule.output_factor
            result: Tensor = factor(call.module, gradient, self._approximation, **into)
            return result
        sums = [self._rule(c).outputs(c.module, g).sum(-1, keepdim=True) for c, g in calls]
        moment = squares if diagonal else second_moment
        return moment(torch.stack(sums).sum(0), 1, **_into(self.outputs, scale))


def _as_one(pairs: Sequence[tuple[LayerCall, Tensor]]) -> tuple[LayerCall, Tensor]:
    """Return calls of one module and shape, with tensors of their examples, as one call."""
    if len(pairs) == 1:
        return pairs[0]
    (call, _), *_ = pairs
    x = torch.cat([each.x for each, _ in pairs])
    y_shape = torch.Size([len(x), *call.y_shape[1:]])
    return replace(call, x=x, y_shape=y_shape), torch.cat([own for _, own in pairs])


def united(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return the Kronecker product ``B (x) A`` that has the partial traces of a sum of products.

    Per group, with ``t_i = tr(A_i) tr(B_i)``::

        A = sum_i tr(B_i) A_i / sum_i tr(B_i)
        B = sum_i tr(A_i) B_i * sum_i tr(B_i) / sum_i t_i

    so that ``tr(B) A`` and ``tr(A) B``, and thereby the trace, are those of ``sum_i B_i (x) A_i``.
    A single product stays as it is.

    Args:
        pairs: ``A_i`` and ``B_i``.
    """
    if len(pairs) == 1:
        return pairs[0]
    a_traces = torch.stack([trace_of(a) for a, _ in pairs])  # i g
    b_traces = torch.stack([trace_of(b) for _, b in pairs])
    tiny = torch.finfo(a_traces.dtype).tiny
    of_b = b_traces.sum(0)
    total = (a_traces * b_traces).sum(0).clamp_min(tiny)
    a_weights, b_weights = b_traces / of_b.clamp_min(tiny), a_traces * (of_b / total)
    return (
        sum_of([_scaled(a, weight) for (a, _), weight in zip(pairs, a_weights)]),
        sum_of([_scaled(b, weight) for (_, b), weight in zip(pairs, b_weights)]),
    )


def _scaled(factor: Tensor, weight: Tensor) -> Tensor:
    """Return a factor times a number per group, ``[g]``."""
    return factor * weight.reshape(-1, *(1,) * (factor.ndim - 1))


def _into(total: Tensor | None, weight: float) -> dict[str, Any]:
    """Return the keywords that add ``weight`` times a factor to a sum."""
    if total is None:
        return {"alpha": float(weight)}
    return {"out": total, "beta": 1.0, "alpha": float(weight)}

"""Exact second moments of per-example gradients, entry by entry in some basis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain, repeat

import torch
from torch import Tensor

from einconv_kfac.curvature.blocks.eigen import EigenBlock
from einconv_kfac.curvature.devices.products import product
from einconv_kfac.curvature.estimation.capture import LayerCall
from einconv_kfac.curvature.estimation.factor_sums import batch_size
from einconv_kfac.curvature.estimation.moments import no_data
from einconv_kfac.curvature.estimation.token_sums import TokenSums
from einconv_kfac.curvature.factors.approximation import with_ones
from einconv_kfac.curvature.layers.layer import Layer
from einconv_kfac.curvature.layers.layer_rule import LayerRule
from einconv_kfac.distributed.summable import SumPart

_GRADIENT_ENTRIES = 1 << 22
"""Number of entries of the per-example gradients that are held at a time."""


class SquaredGradients:
    """Sums of ``(U_B^T G_n U_A)^2`` with the gradients ``G_n [g, co, d]`` of single examples.

    In the eigenbasis of Kronecker factors these are the corrected eigenvalues of EKFAC
    (George et al., 2018); in the identity basis they are the exact diagonal of the Fisher
    or GGN.

    ``U_A`` is applied to the inputs if these are fewer rows than the gradients, and to the
    gradients otherwise. One-hot inputs without ``U_A`` are not formed: the gradients of positions
    with the same index are summed. A module that uses the transposed weight contributes the
    transpose of its gradient, so that its inputs are the rows.

    Args:
        layer: The layer.
        basis: A block whose bases are taken; its eigenvalues are not used.
    """

    def __init__(self, layer: Layer, basis: EigenBlock | None = None) -> None:
        self.layer = layer
        self.examples = 0
        self._basis = basis
        self.total: Tensor | None = None  # of the squares so far, [g, co, d]
        self._inputs: Tensor | None = None
        self._tokens: TokenSums | None = None
        self._basis_is_pending = False
        self._one_hot = all(use.rule.one_hot for use in layer.uses)

    @property
    def needs_examples(self) -> bool:
        """See `Moments`."""
        return True

    @torch.no_grad()
    def add_inputs_(
        self,
        calls: Sequence[LayerCall],
        examples: int | None = None,
        weight: int | None = None,
    ) -> None:
        """See `LayerMoments.add_inputs_`."""
        size = batch_size(self.layer, calls)
        self.examples += size if examples is None else examples
        if self.layer.is_tied:
            return  # the gradients are needed as well
        _, channels, columns = self.layer.layout.shape
        if self._one_hot:
            found = [self._rule(call).indices(call.module, call.x) for call in calls]
            self._add_indices_(torch.cat(found, dim=-1), columns)
            return
        a = torch.cat([self._columns(call) for call in calls], dim=-1)  # n g d s
        self._basis_is_pending = a.shape[-1] > channels
        self._inputs = a.mT if self._basis_is_pending else self._rotated_rows(a.mT)

    def snapshot(self) -> Callable[[], None]:
        """See `Moments`."""
        known = dict(vars(self))
        return lambda: vars(self).update(known)

    def _add_indices_(self, indices: Tensor, size: int) -> None:
        """Keep one-hot inputs, given by the entries ``[n, s]`` that are 1."""
        basis = None if self._basis is None else self._basis.basis_a
        if basis is None:
            self._tokens = TokenSums.of(indices, size)
        else:  # rows of the basis
            rows = torch.cat([basis[0], basis.new_zeros(1, size)])
            self._inputs = rows[indices].unsqueeze(1)

    @torch.no_grad()
    def add_gradients_(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor],
        scale: float,
        are_alone: Sequence[bool] = (),
    ) -> None:
        """See `Moments`."""
        size = batch_size(self.layer, calls)
        if self.layer.is_tied:
            several = zip(*(torch.split(gradient, size) for gradient in gradients))
            for own, is_alone in zip(several, chain(are_alone, repeat(False))):
                self._add_products_(*self._both(calls, own), scale, is_alone)
            return
        rotated = torch.cat([self._rotated(c, dy) for c, dy in zip(calls, gradients)], dim=-1)
        for g, is_alone in zip(torch.split(rotated, size), chain(are_alone, repeat(False))):
            self._add_products_(g, self._inputs, scale, is_alone)

    def _add_products_(self, g: Tensor, a: Tensor | None, scale: float, is_alone: bool) -> None:
        """Add the squares of ``g a`` for gradients ``[n, g, co, s]`` and inputs ``[n, g, s, d]``.

        Without inputs, the one-hot ones are taken. Those of all examples are one if `is_alone`.
        """
        if self.total is None:
            self.total = g.new_zeros(self.layer.layout.shape)
        if a is None:
            assert self._tokens is not None
            self._tokens.add_squares_(self.total, g, scale, is_alone=is_alone)
            return
        a = a.to(g.dtype)
        if is_alone:  # all examples are positions of one
            g, a = g.permute(1, 2, 0, 3).flatten(2)[None], a.transpose(0, 1).flatten(1, 2)[None]
        if a.shape[2] == 1:  # no weight sharing: squares of outer products
            left, right = g.squeeze(-1).square(), a.squeeze(2).square()
            self.total.add_(torch.einsum("nga,ngb->gab", left, right), alpha=scale)
            return
        step = max(1, _GRADIENT_ENTRIES // self.total.numel())
        for part_g, part_a in zip(torch.split(g, step), torch.split(a, step)):
            outer = part_g @ part_a  # n g co d
            outer = self._rotated_rows(outer) if self._basis_is_pending else outer
            if len(outer) == 1:  # large ones pass through memory once
                self.total.addcmul_(outer[0], outer[0], value=scale)
            else:
                self.total.add_(outer.square_().sum(0), alpha=scale)

    def add_examples_(self, examples: int) -> None:
        """See `Moments`."""
        self.examples += examples

    @torch.no_grad()
    def add_weight_gradient_(self, gradient: Tensor, scale: float) -> None:
        """See `Moments`."""
        g = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if self._basis is not None and self._basis.basis_b is not None:
            g = self._basis.basis_b.to(g).mT @ g
        rotated = self._rotated_rows(g.unsqueeze(0)).squeeze(0)
        self.total = torch.zeros_like(rotated) if self.total is None else self.total
        self.total.addcmul_(rotated, rotated, value=scale)

    def parts(self) -> list[SumPart]:
        """See `Summable`."""
        return [SumPart.of(self, "total", self.layer.layout.shape, self.layer.device, for_all=True)]

    def counts(self) -> list[int]:
        """See `Summable`."""
        return [self.examples]

    def set_counts_(self, counts: Sequence[int]) -> None:
        """See `Summable`."""
        (self.examples,) = counts

    def block(self, scale: float) -> EigenBlock:
        """Return the block with the averages as eigenvalues.

        Raises:
            RuntimeError: If nothing was added.
        """
        if self.total is None:
            raise no_data(self.layer)
        values = self.total * (scale / self.examples)
        if self._basis is None:
            return EigenBlock(None, None, values, self.layer.layout)
        return EigenBlock(self._basis.basis_a, self._basis.basis_b, values, self.layer.layout)

    def _columns(self, call: LayerCall) -> Tensor:
        """Return ``a`` as ``[n, g, d, s]``."""
        a = self._rule(call).inputs(call.module, call.x, call.y_shape)
        a = with_ones(a) if self.layer.bias is not None else a
        return a.to(torch.promote_types(a.dtype, torch.float32))

    def _rotated_rows(self, rows: Tensor) -> Tensor:
        """Return rows ``[n, g, r, d]`` times ``U_A``, in one product per group."""
        basis = None if self._basis is None else self._basis.basis_a
        if basis is None:
            return rows
        n, g, r, d = rows.shape
        together = rows.transpose(0, 1).reshape(g, n * r, d)
        return product(together, basis.to(rows)).reshape(g, n, r, d).transpose(0, 1)

    def _rotated(self, call: LayerCall, gradient: Tensor) -> Tensor:
        """Return ``U_B^T g`` as ``[n, g, co, s]``."""
        g = self._gradients(call, gradient)
        basis = None if self._basis is None else self._basis.basis_b
        return g if basis is None else basis.to(g).mT @ g

    def _both(
        self, calls: Sequence[LayerCall], gradients: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sides ``[n, g, co, s]`` and ``[n, g, s, d]`` of the calls of tied modules."""
        left, right = [], []
        for call, gradient in zip(calls, gradients):
            columns = self._columns(call), self._gradients(call, gradient)
            is_transposed = self.layer.use_of(call.module).transposed
            a, g = columns[::-1] if is_transposed else columns
            left.append(g)
            right.append(a)
        g, a = torch.cat(left, dim=-1), torch.cat(right, dim=-1).mT
        basis = None if self._basis is None else self._basis.basis_b
        g = g if basis is None else basis.to(g).mT @ g
        return g, self._rotated_rows(a.to(g.dtype))

    def _gradients(self, call: LayerCall, gradient: Tensor) -> Tensor:
        """Return ``g`` as ``[n, g, co, s]``."""
        g = self._rule(call).outputs(call.module, gradient)
        return g.to(torch.promote_types(g.dtype, torch.float32))

    def _rule(self, call: LayerCall) -> LayerRule:
        """Return the rule of the module that was called."""
        return self.layer.use_of(call.module).rule

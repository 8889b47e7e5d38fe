"""Weight normalisation (Salimans and Kingma, 2016): ``W = g v / |v|``, with one norm per slice."""

from __future__ import annotations

import torch
from torch import Tensor

from einconv_kfac.curvature.layers.computed_weight import ComputedWeight, Values

SMALLEST_SCALE = 0.1
"""Scales below this fraction of their root mean square count as if they were larger. The direction
of a slice with a small scale hardly changes the weight, so that its exact step would be large."""
SMALLEST_RATIO = 1e-3
"""The same for scales below this multiple of the norm of their slice, as where all are zero."""


class NormalizedWeight(ComputedWeight):
    """The parameters are ``v`` and ``g``, which has the shape of the norms and broadcasts.

    With ``h = v / |v|`` and the part ``t(u) = u - h <h, u>`` of a tensor across ``h``,

        J (dv, dg) = h dg + (g / |v|) t(dv)
        J^+ u = (|v| / g t(u), <h, u>)

    ``J`` is onto as long as no ``g`` is zero, and ``J^+`` is bounded where one is small.
    """

    def value(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`."""
        v, g = parameters
        return v * (g / _norm(v, g))

    def change(self, parameters: Values, update: Values) -> Tensor:
        """See `ComputedWeight`."""
        v, g = parameters
        (dv, dg), norm = update, _norm(v, g)
        h = v / norm
        return h * (dg - along(h, dv, g) * g / norm) + dv * (g / norm)

    def gradient(self, parameters: Values, gradients: Values) -> Tensor:
        """See `ComputedWeight`."""
        v, g = parameters
        (dv, dg), norm = gradients, _norm(v, g)
        h, factor = v / norm, norm * bounded_inverse(g, norm)
        return h * (dg - along(h, dv, g) * factor) + dv * factor

    def step(self, parameters: Values, step: Tensor) -> Values:
        """See `ComputedWeight`."""
        v, g = parameters
        norm = _norm(v, g)
        h = v / norm
        radial = along(h, step, g)
        return (step - h * radial) * (norm * bounded_inverse(g, norm)), radial

    def size(self, first: Tensor) -> Tensor:
        """See `ComputedWeight`."""
        return _norm(first, self.owner.get_parameter(self.attributes[1]))

    def stretch(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`."""
        v, g = parameters
        squares = (g / _norm(v, g)).square()
        return squares.mean() + (1 - squares).sum() / v.numel()


def _norm(v: Tensor, g: Tensor) -> Tensor:
    """Return the norms of the slices, shaped like the scales."""
    return v.square().sum_to_size(g.shape).sqrt()


def along(h: Tensor, tensor: Tensor, g: Tensor) -> Tensor:
    """Return the inner product of each slice with ``h``, shaped like the scales."""
    return (h * tensor).sum_to_size(g.shape)


def bounded_inverse(g: Tensor, norm: Tensor) -> Tensor:
    """Return ``1 / g``, bounded and continuous where a scale is small."""
    square = g.square()
    smallest = torch.maximum(SMALLEST_SCALE**2 * square.mean(), SMALLEST_RATIO**2 * norm.square())
    return g / torch.maximum(square, smallest)

"""Weight standardisation (Qiao et al., 2019; Brock et al., 2021): rows of mean 0 and variance 1."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.computed.weight_norm import along, bounded_inverse
from einconv_kfac.curvature.layers.computed_weight import ComputedWeight, Values

KINDS = tuple(
    f"timm.layers.std_conv.{name}"
    for name in ("StdConv2d", "StdConv2dSame", "ScaledStdConv2d", "ScaledStdConv2dSame")
)
"""Types of timm that standardize their weight in the forward pass."""


class StandardizedWeight(ComputedWeight):
    """The parameters are ``v`` and, if there is one, a gain ``k`` for each row.

    A row of ``d`` entries has ``W = k s (v - mean) / sqrt(variance + eps)`` with a constant ``s``.
    That is weight normalisation of ``c = v - mean`` with the scale ``g = k s sqrt(d) r`` and the
    ratio ``r = sqrt(variance / (variance + eps))``. The range of ``J`` has rows of mean 0, and
    without gains they are orthogonal to those of ``W``. That ``W`` changes a little with ``|c|``,
    as ``eps`` is not zero, is left out of ``J^+``.
    """

    def __init__(self, module: nn.Module) -> None:
        names = ("weight", "gain") if "gain" in module._parameters else ("weight",)
        super().__init__(module, names)

    def value(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`."""
        _, h, scale, _ = self._rows(parameters)
        return h * scale

    def change(self, parameters: Values, update: Values) -> Tensor:
        """See `ComputedWeight`."""
        norm, h, scale, ratio = self._rows(parameters)
        moved = _centred(update[0])
        found = (moved - h * (along(h, moved, norm) * ratio.square())) * (scale / norm)
        return found if len(update) == 1 else found + h * (update[1] * self._unit(h) * ratio)

    def gradient(self, parameters: Values, gradients: Values) -> Tensor:
        """See `ComputedWeight`."""
        norm, h, scale, ratio = self._rows(parameters)
        own = _centred(gradients[0])
        factor = norm * bounded_inverse(scale, norm)
        found = (own - h * along(h, own, norm)) * factor
        return found if len(gradients) == 1 else found + h * (gradients[1] / self._unit(h) / ratio)

    def step(self, parameters: Values, step: Tensor) -> Values:
        """See `ComputedWeight`."""
        norm, h, scale, ratio = self._rows(parameters)
        own, radial = _centred(step), along(h, step, norm)
        first = (own - h * radial) * (norm * bounded_inverse(scale, norm))
        return (first,) if len(parameters) == 1 else (first, radial / self._unit(h) / ratio)

    def size(self, first: Tensor) -> Tensor:
        """See `ComputedWeight`; means of rows stay in any case."""
        return _norms(_centred(first))

    def stretch(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`; that of directions across the rows."""
        norm, _, scale, _ = self._rows(parameters)
        return (scale / norm).square().mean()

    def _rows(self, parameters: Values) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ``|c|``, ``c / |c|``, ``g`` and ``r`` of each row."""
        owner: Any = self.owner
        c = _centred(parameters[0])
        norm = _norms(c)
        variance = norm.square() / c[0].numel()
        ratio = (variance / (variance + owner.eps)).sqrt()
        gain = parameters[1] if len(parameters) > 1 else torch.ones_like(norm)
        return norm, c / norm, gain * self._unit(c) * ratio, ratio

    def _unit(self, weight: Tensor) -> float:
        """Return ``s sqrt(d)``."""
        owner: Any = self.owner
        return float(getattr(owner, "scale", 1.0)) * math.sqrt(weight[0].numel())


def _centred(rows: Tensor) -> Tensor:
    """Return rows without their means."""
    return rows - rows.mean(tuple(range(1, rows.ndim)), keepdim=True)


def _norms(rows: Tensor) -> Tensor:
    """Return the norms of rows, which broadcast."""
    return rows.square().sum(tuple(range(1, rows.ndim)), keepdim=True).sqrt()

"""Weights that are a parameter times a constant, entry by entry: masks, pruning, fixed scales."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from einconv_kfac.curvature.layers.computed_weight import ComputedWeight, Values

SMALLEST_ENTRY = 0.1
"""Entries of the constant below this fraction of the root mean square of those that are not zero
count as if they were larger. A step of their parameter hardly changes the weight, so that the exact
one would be large."""


class Constant:
    """A constant of a module, which it multiplies a parameter by; it keeps no reference to it.

    Args:
        name: Its name in the module, where it is read when it is needed. If empty, it is that of
            the calls that are seen.
        in_place: Whether the module multiplies the parameter itself, so that calls do not show it.
        seen: That of the latest call, ``None`` for 1.
    """

    def __init__(
        self, name: str = "", *, in_place: bool = False, seen: Tensor | None = None
    ) -> None:
        self._name, self._in_place, self._seen = name, in_place, seen

    def of(self, module: nn.Module) -> Tensor | None:
        """Return the present constant of the module, or ``None`` for 1."""
        if not self._name:
            return self._seen
        found: Tensor = getattr(module, self._name)
        return found.detach()

    def see_(self, module: nn.Module, constant: Tensor | None) -> None:
        """Take over the constant of a call, ``None`` for 1."""
        if self._in_place:
            return
        named = self.of(module) if self._name else None
        if named is None or constant is None or named.data_ptr() != constant.data_ptr():
            self._name, self._seen = "", constant


class ProductWeight(ComputedWeight):
    """``W = m * v`` with one parameter ``v`` and a constant ``m``, which broadcasts to its shape.

    ``J`` is the diagonal matrix of ``m``. Its pseudo-inverse has ``1 / m`` where ``m`` is not zero,
    and zero elsewhere: what a mask hides has no gradient and stays as it is. It is bounded where an
    entry is small.

    Args:
        owner: The module that has the parameter.
        attribute: Its name in it.
        constant: Its constant.
    """

    ignores_norm = False

    def __init__(self, owner: nn.Module, attribute: str, constant: Constant) -> None:
        super().__init__(owner, (attribute,))
        self._constant = constant

    @property
    def constant(self) -> Tensor | None:
        """The present constant, or ``None`` for 1."""
        return self._constant.of(self.owner)

    def value(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`."""
        return self._times(parameters[0])

    def change(self, parameters: Values, update: Values) -> Tensor:
        """See `ComputedWeight`."""
        return self._times(update[0])

    def gradient(self, parameters: Values, gradients: Values) -> Tensor:
        """See `ComputedWeight`."""
        return self._divided(gradients[0])

    def step(self, parameters: Values, step: Tensor) -> Values:
        """See `ComputedWeight`."""
        return (self._divided(step),)

    def size(self, first: Tensor) -> Tensor:
        """See `ComputedWeight`; ``W`` depends on every norm."""
        raise NotImplementedError

    def stretch(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`; it is 1 if all is masked."""
        (v,) = parameters
        constant = self.constant
        if constant is None:
            return v.new_ones(())
        mean = _mean_square(constant.to(v))
        return torch.where(mean > 0, mean, 1)

    def mask(self) -> Tensor | None:
        """See `ComputedWeight`; numbers hide nothing."""
        constant, (own,) = self.constant, self.parameters().values()
        if constant is None or constant.ndim == 0:
            return None
        return (constant != 0).to(own).expand_as(own)

    def _times(self, tensor: Tensor) -> Tensor:
        """Return ``m`` times a tensor."""
        constant = self.constant
        return tensor if constant is None else tensor * constant.to(tensor)

    def _divided(self, tensor: Tensor) -> Tensor:
        """Return the pseudo-inverse of ``J`` times a tensor."""
        constant = self.constant
        if constant is None:
            return tensor
        m = constant.to(tensor)
        smallest = SMALLEST_ENTRY**2 * _mean_square(m)
        inverse = m / torch.maximum(m.square(), smallest)
        return tensor * inverse.nan_to_num_(0.0, 0.0, 0.0)


def _mean_square(constant: Tensor) -> Tensor:
    """Return the mean square of the entries that are not zero, or 0, without a wait for a GPU."""
    return constant.square().sum() / constant.count_nonzero().clamp(min=1)

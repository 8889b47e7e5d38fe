"""Spectral normalization (Miyato et al., 2018): ``W = V / sigma``."""

from __future__ import annotations

from torch import Tensor, nn

from einconv_kfac.curvature.layers.computed_weight import ComputedWeight, Values


class SpectralWeight(ComputedWeight):
    """The parameter is ``V``, and ``sigma = <n, V>`` with the product ``n`` of two unit vectors.

    Torch holds the vectors in buffers, and does not differentiate them. With ``w = W / |W|``,

        J dV = (dV - W <n, dV>) / sigma
        J^+ u = sigma (I - w w^T) (I - n n^T) u

    The range of ``J`` is what ``n`` is orthogonal to, its null space the multiples of ``V``.

    Args:
        owner: The module that has the parameter.
        attribute: Its name in it.
        path: See `ComputedWeight`.
        vectors: The module that has the vectors.
        names: Their names in it.
        dim: The dimension of the weight that the first belongs to.
    """

    def __init__(
        self,
        owner: nn.Module,
        attribute: str,
        path: str,
        vectors: nn.Module,
        names: tuple[str, str],
        dim: int,
    ) -> None:
        super().__init__(owner, (attribute,), path)
        self._vectors, self._names, self._dim = vectors, names, dim

    def value(self, parameters: Values) -> Tensor:
        """See `ComputedWeight`."""
        (v,) = parameters
        return v / (self._normal(v) * v).sum()

    def change(self, parameters: Values, update: Values) -> Tensor:
        """See `ComputedWeight`."""
        ((v,), (dv,)) = parameters, update
        n = self._normal(v)
        sigma = (n * v).sum()
        return (dv - v * ((n * dv).sum() / sigma)) / sigma

    def gradient(self, parameters: Values, gradients: Values) -> Tensor:
        """See `ComputedWeight`."""
        ((v,), (dv,)) = parameters, gradients
        n = self._normal(v)
        return _across(n, _across(v, dv)) * (n * v).sum()

    def step(self, parameters: Values, step: Tensor) -> Values:
        """See `ComputedWeight`."""
        (v,) = parameters
        n = self._normal(v)
        return (_across(v, _across(n, step)) * (n * v).sum(),)

    def size(self, first: Tensor) -> Tensor:
        """See `ComputedWeight`."""
        return first.square().sum().sqrt()

    def _normal(self, v: Tensor) -> Tensor:
        """Return ``n``, in the shape of the weight."""
        left, right = (self._vectors.get_buffer(name).detach().to(v) for name in self._names)
        shape = list(v.shape)
        first = shape.pop(self._dim)
        product: Tensor = left.unsqueeze(1) * right
        return product.reshape(first, *shape).movedim(0, self._dim)


def _across(v: Tensor, tensor: Tensor) -> Tensor:
    """Return the part of a tensor that is orthogonal to another one."""
    return tensor - v * ((v * tensor).sum() / v.square().sum())

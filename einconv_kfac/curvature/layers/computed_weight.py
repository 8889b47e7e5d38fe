"""Weights that layers compute from parameters, as by weight normalisation, and their Jacobians.

A layer multiplies with an effective weight ``W(theta)``. Its block of the Gauss-Newton matrix is
``J^T K J`` with the Jacobian ``J = dW/dtheta`` and the block ``K`` of a layer whose weight is a
parameter. A step ``P g`` of the effective weight has the preimage ``J^+ P (J^+)^T g_theta`` of
smallest norm, with the pseudo-inverse ``J^+``: from the gradients of the parameters, ``(J^+)^T``
returns that of the effective weight, or the part of it in the range of ``J``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

Values: TypeAlias = tuple[Tensor, ...]
"""A tensor for each parameter."""


class ComputedWeight(ABC):
    """The effective weight of a module, as a function of parameters.

    Args:
        owner: The module that has the parameters.
        attributes: Their names in it. The first has the shape of the weight.
        path: Name of the owner in the layer, with a dot behind it, or an empty string.

    Attributes:
        ignores_norm: Whether ``W`` does not depend on norms of the first parameter, see `size`.
    """

    ignores_norm = True

    def __init__(self, owner: nn.Module, attributes: tuple[str, ...], path: str = "") -> None:
        self.owner, self.attributes, self.path = owner, attributes, path

    @abstractmethod
    def value(self, parameters: Values) -> Tensor:
        """Return ``W``."""

    @abstractmethod
    def change(self, parameters: Values, update: Values) -> Tensor:
        """Return ``J u`` for an update ``u`` of the parameters."""

    @abstractmethod
    def gradient(self, parameters: Values, gradients: Values) -> Tensor:
        """Return ``(J^+)^T g``, the gradient by ``W``, from the gradients by the parameters."""

    @abstractmethod
    def step(self, parameters: Values, step: Tensor) -> Values:
        """Return ``J^+ u``, the smallest update of the parameters for an update ``u`` of ``W``."""

    @abstractmethod
    def size(self, first: Tensor) -> Tensor:
        """Return norms of the first parameter, which broadcast, and which ``W`` is invariant to."""

    @abstractmethod
    def stretch(self, parameters: Values) -> Tensor:
        """Return the mean square of the singular values of ``J`` that are not zero, a number."""

    def mask(self) -> Tensor | None:
        """Return 1 where ``W`` is visible and 0 where it is hidden, or ``None`` if all is."""
        return None

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters by their names in the owner, without those that were removed."""
        own = self.owner._parameters
        found = {name: own.get(name) for name in self.attributes}
        return {name: p for name, p in found.items() if isinstance(p, nn.Parameter)}


class NamedWeight:
    """A computed weight whose parameters have names in a model.

    Args:
        name: Name of the effective weight.
        parameters: Names of the parameters.
        computed: The weight.
    """

    def __init__(self, name: str, parameters: tuple[str, ...], computed: ComputedWeight) -> None:
        self.name, self.parameters, self.computed = name, parameters, computed

    def tensors(self) -> dict[str, nn.Parameter]:
        """Return the parameters by name, without those that were removed since."""
        known = self.computed.parameters()
        names = zip(self.parameters, self.computed.attributes)
        return {name: known[attribute] for name, attribute in names if attribute in known}

    def gradient(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Return the gradient by the weight; where a parameter has none, zero stands for it."""
        point = self._present()
        given = [gradients.get(name) for name in self.parameters]
        own = [torch.zeros_like(p) if g is None else g.to(p) for g, p in zip(given, point)]
        return self.computed.gradient(point, tuple(own))

    def steps(self, step: Tensor) -> dict[str, Tensor]:
        """Return the updates of the parameters by name, for one of the weight."""
        point = self._present()
        found = self.computed.step(point, step.to(point[0].dtype))
        return dict(zip(self.parameters, found))

    def stretch(self) -> Tensor:
        """Return the mean square of the singular values of ``J`` that are not zero, a number."""
        return self.computed.stretch(self._present())

    def mask(self) -> Tensor | None:
        """Return 1 where the weight is visible and 0 where it is hidden, or ``None`` if all is."""
        return self.computed.mask()

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Return the weight for values of the parameters by name."""
        return self.computed.value(self._at(parameters))

    def change(self, parameters: Mapping[str, Tensor], update: Mapping[str, Tensor]) -> Tensor:
        """Return the change of the weight by an update; zero for parameters that it lacks."""
        point = self._at(parameters)
        given = [update.get(name) for name in self.parameters]
        own = [torch.zeros_like(p) if u is None else u.to(p) for u, p in zip(given, point)]
        return self.computed.change(point, tuple(own))

    def _at(self, parameters: Mapping[str, Tensor]) -> Values:
        """Return parameters in the precision of steps; those that are not given are the present."""
        present = self.tensors()
        return tuple(_precise(parameters.get(name, present[name])) for name in self.parameters)

    def _present(self) -> Values:
        """Return the present parameters in the precision of steps."""
        return self._at({})


def _precise(tensor: Tensor) -> Tensor:
    """Return a tensor without its graph, at least in float32."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))

"""Inner products over the parameters of each layer, which the host reads at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from einconv_kfac.curvature.devices.sending import sent
from einconv_kfac.optim.vectors import Direction, layer_of, norms, real_vectors

Vectors = Mapping[str, Tensor]
"""The entries of tensors, by parameter name."""

LARGEST_JOINED_ENTRIES = 1 << 12
"""Entries of a tensor up to which copying it costs less than starting an operation for it."""
SMALLEST_COUNT = 8
"""Number of such tensors up to which operations are started for each."""


@dataclass(frozen=True)
class LayerProducts:
    """Inner products of directions, over the parameters of one layer.

    Args:
        past: ``g.m``, of the gradient and the slow momentum.
        own: ``g.u``, of the gradient and the step.
        momentum: ``m.m``.
        update: ``u.u``.
        parameters: ``w.w``.
    """

    past: float = 0.0
    own: float = 0.0
    momentum: float = 0.0
    update: float = 0.0
    parameters: float = 0.0

    def scaled(self, factor: float) -> LayerProducts:
        """Return the products for a multiple of the step."""
        own, update = self.own * factor, self.update * factor**2
        return LayerProducts(self.past, own, self.momentum, update, self.parameters)


@dataclass(frozen=True)
class PendingProducts:
    """The products of layers before the host has read them.

    Args:
        layers: The layers.
        columns: The parameters of the numbers, for one kind of product after the other.
        numbers: The numbers, a vector in float64.
    """

    layers: Sequence[str]
    columns: Sequence[Sequence[str]]
    numbers: Tensor

    def of(self, numbers: Iterable[float]) -> dict[str, LayerProducts]:
        """Return the products by layer, from the numbers on the host."""
        rows = {layer: [0.0] * len(self.columns) for layer in self.layers}
        found = iter(numbers)
        for index, names in enumerate(self.columns):
            for layer, number in zip(map(layer_of, names), found):
                rows[layer][index] += number
        return {layer: LayerProducts(*row) for layer, row in rows.items()}

    def totals(self) -> Tensor:
        """Return the products that the host has not read, ``[5, layers]``, on the device."""
        count = len(self.layers)
        places = {layer: index for index, layer in enumerate(self.layers)}
        index = tuple(
            row * count + places[layer]
            for row, names in enumerate(self.columns)
            for layer in map(layer_of, names)
        )
        sums = self.numbers.new_zeros(len(self.columns) * count)
        sums.index_add_(0, on_device(index, sums.device), self.numbers)
        return sums.reshape(len(self.columns), count)


def layer_products(
    point: tuple[Direction, Direction], momentum: Direction, update: Direction
) -> dict[str, LayerProducts]:
    """Return the products of each layer; the host waits for the device once.

    Args:
        point: The parameters, and the gradient.
        momentum: ``m``, of some of the parameters.
        update: ``u``; its layers are returned.
    """
    found = pending_products(point, momentum, update)
    return found.of(found.numbers.tolist())


def pending_products(
    point: tuple[Direction, Direction], momentum: Direction, update: Direction
) -> PendingProducts:
    """Return the products of each layer, which the host has not read yet; see `layer_products`."""
    parameters, gradient = point
    names = [name for name, tensor in update.items() if tensor.numel()]
    followed = [name for name in names if name in momentum]
    g, u, w, m = real_vectors(names, gradient, update, parameters, momentum)
    parts = [*_dots(followed, g, m), *_dots(names, g, u)]  # which change the order of names
    columns = [followed, names, followed, names, names]
    vectors = [v[name] for v, own in zip((m, u, w), columns[2:]) for name in own]
    squares = [torch.stack(norms(vectors)).double().square()] if vectors else []
    none = torch.zeros(0, dtype=torch.float64)
    numbers = torch.cat([*(part.double() for part in parts), *squares]) if squares else none
    return PendingProducts([*dict.fromkeys(map(layer_of, update))], columns, numbers)


def _dots(names: list[str], a: Vectors, b: Vectors) -> Iterator[Tensor]:
    """Yield inner products in the order of names, which is changed: small tensors come last."""
    small = [name for name in names if b[name].numel() <= LARGEST_JOINED_ENTRIES]
    joined = small if len(small) > SMALLEST_COUNT else []
    if joined:
        others = set(names).difference(joined)
        names[:] = [*(name for name in names if name in others), *joined]
    alone = names[: len(names) - len(joined)]
    if alone:
        yield torch.stack([torch.dot(a[name], b[name]) for name in alone])
    if joined:
        left, right = (torch.cat([own[name] for name in joined]) for own in (a, b))
        sizes = on_device(tuple(b[name].numel() for name in joined), left.device)
        products = left.double() * right
        yield torch.segment_reduce(products, "sum", lengths=sizes, unsafe=True)


@lru_cache(maxsize=16)
def on_device(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return numbers on a device, to which they are sent once; the host does not wait."""
    return sent(torch.tensor(numbers), device)


def scaled_products(
    products: Mapping[str, LayerProducts], factor: float
) -> dict[str, LayerProducts]:
    """Return the products of each layer for a multiple of the step."""
    return {layer: own.scaled(factor) for layer, own in products.items()}

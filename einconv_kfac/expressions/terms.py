"""The tensors of a convolution as nodes of a network, and the checks of their shapes.

A prime (``mark="'"``) makes the second copy of a node's own indices; ``n``, ``g`` and what a
network shares between the copies are given without.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from math import prod

from torch import Tensor

from einconv_kfac.expressions.expression import Expression
from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Leaf, Network, Node, Pattern, simplified
from einconv_kfac.network.step import Shape, Split


def indices(letter: str, ndim: int, mark: str = "") -> tuple[str, ...]:
    """Return one index per dimension: ``i0 i1 ..``."""
    return tuple(f"{letter}{dim}{mark}" for dim in range(ndim))


def input_node(geometry: Geometry, batch: int, channels: int, slot: int, mark: str = "") -> Node:
    """Return the input ``x[n, g, ci, i]``, given as ``[n, (g ci), *i]``."""
    source = (batch, channels, *geometry.input_size)
    leaf = Leaf("x", slot, source, (_grouped(geometry, channels, 1, "x"),))
    return Node(leaf, ("n", "g", f"ci{mark}", *indices("i", geometry.ndim, mark)))


def plain_node(letter: str, sizes: Shape, batch: int, channels: int) -> Node:
    """Return the only tensor ``x[n, c, *]`` of a network that knows no groups."""
    leaf = Leaf("x", 0, (batch, channels, *sizes))
    return Node(leaf, ("n", "c", *indices(letter, len(sizes))))


def output_node(geometry: Geometry, batch: int, channels: int, slot: int, name: str = "v") -> Node:
    """Return a tensor like the output, ``v[n, g, co, o]``, given as ``[n, (g co), *o]``."""
    source = (batch, channels, *geometry.output_size)
    leaf = Leaf(name, slot, source, (_grouped(geometry, channels, 1, name),))
    return Node(leaf, ("n", "g", "co", *indices("o", geometry.ndim)))


def weight_node(geometry: Geometry, in_channels: int, out_channels: int, slot: int) -> Node:
    """Return the kernel ``W[g, co, ci, k]``, given as ``[(g co), ci, *k]``."""
    per_group = geometry.split_channels(in_channels, "channels of `x`")
    source = (out_channels, per_group, *geometry.kernel_size)
    leaf = Leaf("W", slot, source, (_grouped(geometry, out_channels, 0, "weight"),))
    return Node(leaf, ("g", "co", "ci", *indices("k", geometry.ndim)))


def pattern_nodes(geometry: Geometry, *, k: str = "", o: str = "", i: str = "") -> tuple[Node, ...]:
    """Return one pattern ``P[k, o, i]`` per dimension; arguments are the marks of its indices."""
    names = zip(*(indices(*pair) for pair in zip("koi", [geometry.ndim] * 3, (k, o, i))))
    return tuple(Node(Pattern(axis), triple) for axis, triple in zip(geometry.axes, names))


def expression(network: Network, simplify: bool) -> Expression:
    """Return the network as an einsum expression."""
    network = replace(network, reshape_only=True)
    return Expression(simplified(network) if simplify else network)


def spatial_size(shape: Shape, name: str) -> Shape:
    """Return the spatial part of ``[n, c, *i]``.

    Raises:
        ValueError: If there is none.
    """
    if len(shape) < 3:
        raise ValueError(
            f"`{name}` must have shape [batch, channels, *sizes] with at least one spatial "
            f"dimension, got {list(shape)}."
        )
    return shape[2:]


def check_weight(weight: Shape, in_channels: int, ndim: int, groups: int) -> None:
    """Raise ValueError if a kernel does not match the input.

    The channels are those of ``x``; ``ndim`` counts its spatial dimensions.
    """
    if len(weight) != ndim + 2:
        raise ValueError(
            f"`weight` must have {ndim + 2} dimensions for an input with {ndim} spatial "
            f"dimensions, got shape {list(weight)}."
        )
    if groups < 1 or in_channels % groups or weight[1] * groups != in_channels:
        raise ValueError(
            "`weight` must have shape [out_channels, in_channels / groups, *kernel_size] with "
            f"groups={groups} and the input's {in_channels} channels, got {list(weight)}."
        )
    if weight[0] % groups:
        raise ValueError(
            f"`weight` must have out_channels divisible by groups={groups}, got {weight[0]}."
        )


def check_output(v: Shape, batch: int | None, geometry: Geometry, name: str = "v") -> None:
    """Raise ValueError if a tensor does not have the shape of the convolution's output."""
    expected = ["batch" if batch is None else batch, "channels", *geometry.output_size]
    matches = len(v) == len(expected) and v[2:] == geometry.output_size
    if not matches or batch not in (None, v[0]):
        raise ValueError(
            f"`{name}` must have the shape of the output, [{', '.join(map(str, expected))}], "
            f"got {list(v)}."
        )


def _grouped(geometry: Geometry, channels: int, dim: int, name: str) -> Split:
    """Return the step that splits channels into groups."""
    per_group = geometry.split_channels(channels, f"channels of `{name}`")
    return Split(dim, (geometry.groups, per_group))


def input_factor(
    geometry: Geometry, batch: int, channels: int, other_output: str, scale: Fraction
) -> Network:
    """Return ``scale x P P' x' -> [g, (ci k), (ci' k')]`` for the input (0).

    ``other_output`` marks the outputs of the second copy: empty if both share them.
    """
    kernel = indices("k", geometry.ndim), indices("k", geometry.ndim, "'")
    width = geometry.split_channels(channels, "channels of `x`") * prod(geometry.kernel_size)
    return Network(
        nodes=(
            input_node(geometry, batch, channels, slot=0),
            *pattern_nodes(geometry),
            *pattern_nodes(geometry, k="'", o=other_output, i="'"),
            input_node(geometry, batch, channels, slot=0, mark="'"),
        ),
        output=("g", "ci", *kernel[0], "ci'", *kernel[1]),
        shape=(geometry.groups, width, width),
        scale=scale,
    )


def check_bias(bias: Tensor | None, channels: int) -> None:
    """Raise ValueError if a bias is not one number per output channel."""
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(
            f"`bias` must have one entry per output channel, shape [{channels}], got "
            f"{list(bias.shape)}."
        )

"""The tensors of a convolution as nodes of a network, and the checks of their shapes.

A prime (``mark="'"``) makes the second copy of a node's own indices; ``n``, ``g`` and what a
network shares between the copies are given without.
"""

from __future__ import annotations

from fractions import Fraction
from math import prod

from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Leaf, Network, Node, Pattern
from einconv_kfac.network.step import Shape, Split


def indices(letter: str, ndim: int, mark: str = "") -> tuple[str, ...]:
    """Return one index per dimension: ``i0 i1 ..``."""
    return tuple(f"{letter}{dim}{mark}" for dim in range(ndim))


def input_node(
    geometry: Geometry, batch: int, channels: int, slot: int, mark: str = "", own: str = "ci"
) -> Node:
    """Return the input ``x[n, g, ci, i]``, given as ``[n, (g ci), *i]``.

    The mark goes to the batch and the channels only if ``own`` names them (``n``, ``c``).
    """
    source = (batch, channels, *geometry.input_size)
    leaf = Leaf("x", slot, source, (_grouped(geometry, channels, 1, "x"),))
    batches, inner = (f"{name}{mark if name[0] in own else ''}" for name in ("n", "ci"))
    return Node(leaf, (batches, "g", inner, *indices("i", geometry.ndim, mark)))


def columns_node(geometry: Geometry, batch: int, channels: int) -> Node:
    """Return columns ``z[n, c, k, o]``, given as ``[n, (c k), (o)]``."""
    source = (batch, channels * prod(geometry.kernel_size), geometry.positions)
    steps = Split(2, geometry.output_size), Split(1, (channels, *geometry.kernel_size))
    kernel, output = indices("k", geometry.ndim), indices("o", geometry.ndim)
    return Node(Leaf("z", 0, source).then(*steps), ("n", "c", *kernel, *output))


def plain_node(letter: str, sizes: Shape, batch: int, channels: int) -> Node:
    """Return the only tensor ``x[n, c, *]`` of a network that knows no groups."""
    leaf = Leaf("x", 0, (batch, channels, *sizes))
    return Node(leaf, ("n", "c", *indices(letter, len(sizes))))


def output_node(
    geometry: Geometry,
    batch: int,
    channels: int,
    slot: int,
    *,
    vectors: int | None = None,
    mark: str = "",
    own: str = "o",
) -> Node:
    """Return a tensor like the output, ``v[n, g, co, o]``, given as ``[n, (g co), *o]``.

    With ``vectors``, several of them in front: ``s[v, n, g, co, o]``. The mark goes to ``v``
    and ``n`` only if ``own`` names them.
    """
    source = (batch, channels, *geometry.output_size)
    names = (*(n + (mark if n in own else "") for n in "vn"), "g", "co")
    names += indices("o", geometry.ndim, mark)
    if vectors is None:
        leaf = Leaf("v", slot, source, (_grouped(geometry, channels, 1, "v"),))
        return Node(leaf, names[1:])
    leaf = Leaf("s", slot, (vectors, *source), (_grouped(geometry, channels, 2, "s"),))
    return Node(leaf, names)


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


def check_kernel(weight: Shape, groups: int) -> None:
    """Raise ValueError if a kernel has no spatial dimension, or groups do not divide it."""
    if len(weight) < 3:
        raise ValueError(
            "`weight` must have shape [out_channels, in_channels / groups, *kernel_size], got "
            f"{list(weight)}."
        )
    if groups < 1 or weight[0] % groups:
        raise ValueError(
            f"`weight` must have out_channels divisible by groups={groups}, got {weight[0]}."
        )


def check_transposed_weight(weight: Shape, in_channels: int, ndim: int, groups: int) -> None:
    """Raise ValueError if the kernel of a transposed convolution does not match its input."""
    if len(weight) != ndim + 2 or weight[0] != in_channels:
        raise ValueError(
            "`weight` must have shape [in_channels, out_channels / groups, *kernel_size] with "
            f"the input's {in_channels} channels and {ndim} spatial dimensions, got "
            f"{list(weight)}."
        )
    if groups < 1 or in_channels % groups:
        raise ValueError(f"`groups` must divide the input's {in_channels} channels, got {groups}.")


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
    check_kernel(weight, groups)


def column_channels(columns: Shape, geometry: Geometry) -> int:
    """Return the channels of columns ``[n, (c k), (o)]``.

    Raises:
        ValueError: If they are not of that shape.
    """
    entries = prod(geometry.kernel_size)
    if len(columns) != 3 or columns[1] % entries or columns[2] != geometry.positions:
        raise ValueError(
            f"`z` must have shape [batch, channels * {entries}, {geometry.positions}], got "
            f"{list(columns)}."
        )
    return columns[1] // entries


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
    x, other = (input_node(geometry, batch, channels, 0, mark) for mark in ("", "'"))
    patterns = pattern_nodes(geometry, k="'", o=other_output, i="'")
    return _factor(geometry, (x, *pattern_nodes(geometry), *patterns, other), scale)


def transposed_input_factor(
    geometry: Geometry, batch: int, channels: int, other_output: str, scale: Fraction
) -> Network:
    """Return the factor of a transposed convolution, whose positions are ``i``.

    ``other_output`` marks the positions of the second copy: empty if both share them.
    """
    x, other = (
        Node(
            Leaf("x", 0, (batch, channels, *geometry.output_size)).then(
                _grouped(geometry, channels, 1, "x")
            ),
            ("n", "g", f"ci{mark}", *indices("o", geometry.ndim, mark)),
        )
        for mark in ("", "'")
    )
    patterns = pattern_nodes(geometry, k="'", o="'", i=other_output)
    return _factor(geometry, (x, *pattern_nodes(geometry), *patterns, other), scale)


def _factor(geometry: Geometry, nodes: tuple[Node, ...], scale: Fraction) -> Network:
    """Return the input factor that the nodes, the input first, contract to."""
    kernel = indices("k", geometry.ndim), indices("k", geometry.ndim, "'")
    width = nodes[0].operand.shape[2] * prod(geometry.kernel_size)
    output = ("g", "ci", *kernel[0], "ci'", *kernel[1])
    return Network(nodes, output, (geometry.groups, width, width), scale)

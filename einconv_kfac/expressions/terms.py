"""The tensors of a convolution as nodes of a network.

Where a network has a tensor twice, the indices of the second copy have a prime (``mark="'"``);
``g`` and other indices that both copies share have none.
"""

from __future__ import annotations

from fractions import Fraction
from math import prod

from einconv_kfac.geometry import Geometry
from einconv_kfac.network import Leaf, Network, Node, Pattern, Shape
from einconv_kfac.network.step import Split


def indices(letter: str, ndim: int, mark: str = "") -> tuple[str, ...]:
    """Return one index per dimension: ``i0 i1 ..``."""
    return tuple(f"{letter}{dim}{mark}" for dim in range(ndim))


def input_node(
    geometry: Geometry, batch: int, channels: int, slot: int, mark: str = "", own: str = "ci"
) -> Node:
    """Return the input ``x[n, g, ci, i]``, given as ``[n, (g ci), *i]``.

    Spatial indices get the mark; batch and channels only if ``own`` contains ``n`` and ``c``.
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
    """Return the tensor ``x[n, c, *]`` of a network without groups."""
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
    own: str = "",
) -> Node:
    """Return a tensor like the output, ``v[n, g, co, o]``, given as ``[n, (g co), *o]``.

    With a number of ``vectors`` it is ``s[v, n, g, co, o]``, given as ``[v, n, (g co), *o]``.
    Spatial indices get the mark; vectors and batch only if ``own`` contains ``v`` and ``n``.
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
    """Return one pattern ``P[k, o, i]`` per dimension, with a mark for each of its indices."""
    names = zip(*(indices(*pair) for pair in zip("koi", [geometry.ndim] * 3, (k, o, i))))
    return tuple(Node(Pattern(axis), triple) for axis, triple in zip(geometry.axes, names))


def gradient_nodes(
    geometry: Geometry,
    batch: int,
    in_channels: int,
    out_channels: int,
    *,
    vectors: int | None = None,
    mark: str = "",
    own: str = "",
) -> tuple[Node, ...]:
    """Return the nodes of a weight VJP ``x P v``: input (0), patterns, vector or vectors (1)."""
    return (
        input_node(geometry, batch, in_channels, slot=0, mark=mark, own=own),
        *pattern_nodes(geometry, o=mark, i=mark),
        output_node(geometry, batch, out_channels, slot=1, vectors=vectors, mark=mark, own=own),
    )


def gradient_pair_nodes(
    geometry: Geometry,
    batch: int,
    in_channels: int,
    out_channels: int,
    vectors: int | None = None,
    own: str = "",
) -> tuple[Node, ...]:
    """Return the nodes of a weight VJP twice; ``own`` names the indices besides ``o`` and ``i``."""
    return tuple(
        node
        for mark in ("", "'")
        for node in gradient_nodes(
            geometry, batch, in_channels, out_channels, vectors=vectors, mark=mark, own=own
        )
    )


def _grouped(geometry: Geometry, channels: int, dim: int, name: str) -> Split:
    """Return the step that splits the channels into groups."""
    per_group = geometry.split_channels(channels, f"channels of `{name}`")
    return Split(dim, (geometry.groups, per_group))


def input_factor(geometry: Geometry, batch: int, channels: int, reduce: bool) -> Network:
    """Return ``scale x P P' x' -> [g, (ci k), (ci' k')]`` for the input (0).

    KFC: both copies share the outputs ``o``, and the scale is ``1/N``. KFAC-reduce: each copy is
    averaged over its outputs, and the scale is ``1/(N O^2)``.
    """
    x, other = (input_node(geometry, batch, channels, 0, mark) for mark in ("", "'"))
    patterns = pattern_nodes(geometry, k="'", o="'" if reduce else "", i="'")
    nodes = (x, *pattern_nodes(geometry), *patterns, other)
    return _factor(geometry, nodes, _factor_scale(batch, geometry.positions, reduce))


def transposed_input_factor(geometry: Geometry, batch: int, channels: int, reduce: bool) -> Network:
    """Return the `input_factor` of a transposed convolution, whose outputs are ``i``."""
    x, other = (
        Node(
            Leaf("x", 0, (batch, channels, *geometry.output_size)).then(
                _grouped(geometry, channels, 1, "x")
            ),
            ("n", "g", f"ci{mark}", *indices("o", geometry.ndim, mark)),
        )
        for mark in ("", "'")
    )
    patterns = pattern_nodes(geometry, k="'", o="'", i="'" if reduce else "")
    nodes = (x, *pattern_nodes(geometry), *patterns, other)
    return _factor(geometry, nodes, _factor_scale(batch, prod(geometry.input_size), reduce))


def _factor_scale(batch: int, outputs: int, reduce: bool) -> Fraction:
    """Return one over the number of examples, and over the squared number of outputs."""
    return Fraction(1, max(batch, 1) * (outputs**2 if reduce else 1))


def _factor(geometry: Geometry, nodes: tuple[Node, ...], scale: Fraction) -> Network:
    """Return the contraction of the nodes, the input first, to the input factor."""
    kernel = indices("k", geometry.ndim), indices("k", geometry.ndim, "'")
    width = nodes[0].operand.shape[2] * prod(geometry.kernel_size)
    output = ("g", "ci", *kernel[0], "ci'", *kernel[1])
    return Network(nodes, output, (geometry.groups, width, width), scale)

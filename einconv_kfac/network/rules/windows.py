"""Rules for index patterns: narrower, simpler, or no pattern at all."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from einconv_kfac.geometry import Axis
from einconv_kfac.network.network import Edit, Network, Node, Steps
from einconv_kfac.network.operand import ROLES, Delta, Pattern
from einconv_kfac.network.step import Drop, Insert, Merge, Narrow, Pad, Split, Step, Windows


def crop(network: Network) -> Network | None:
    """Drop the inputs behind the last window.

    ``P(I) x = P(E) x[:E]`` with ``E = (O - 1) S + D (K - 1) + 1 - p_left``; the adjoint pads
    with zeros.
    """
    for node in network.patterns:
        axis, (_, _, i) = _axis(node), node.indices
        used = max(1, (axis.output_size - 1) * axis.stride + axis.span - axis.padding[0])
        if used < axis.input_size and network.editable(i, node, pads=True):
            cropped = replace(axis, input_size=used, padding=(axis.padding[0], 0))
            if cropped.output_size == axis.output_size:
                return _narrow(network, node, "i", 0, cropped)
    return None


def trim_kernel(network: Network) -> Network | None:
    """Drop the outermost kernel entries that meet nothing but padding.

    By the shift ``P[k+1, o, i+D] = P[k, o, i]``: with ``k0`` such entries in front,
    ``P(K, p)[k + k0, o, i] = P(K - k0, p - k0 D)[k, o, i]``.
    """
    for node in network.patterns:
        axis = _axis(node)
        alive = [k for k in range(axis.kernel_size) if axis.outputs(k)]
        if alive and len(alive) < axis.kernel_size:
            first, size = alive[0], alive[-1] - alive[0] + 1
            trimmed = _shifted(axis, first * axis.dilation, size, axis.output_size)
            if (
                trimmed
                and size < axis.kernel_size
                and network.editable(node.indices[0], node, pads=True)
            ):
                return _narrow(network, node, "k", first, trimmed)
    return None


def trim_output(network: Network) -> Network | None:
    """Drop the outermost outputs that meet nothing but padding.

    By the shift ``P[k, o+1, i+S] = P[k, o, i]``: with ``o0`` such outputs in front,
    ``P(O, p)[k, o + o0, i] = P(O - o0, p - o0 S)[k, o, i]``.
    """
    for node in network.patterns:
        axis = _axis(node)
        alive = sorted({o for k in range(axis.kernel_size) for o in axis.outputs(k)})
        if alive and len(alive) < axis.output_size:
            first, size = alive[0], alive[-1] - alive[0] + 1
            trimmed = _shifted(axis, first * axis.stride, axis.kernel_size, size)
            if (
                trimmed
                and size < axis.output_size
                and network.editable(node.indices[1], node, pads=True)
            ):
                return _narrow(network, node, "o", first, trimmed)
    return None


def swap(network: Network) -> Network | None:
    """Let kernel and output trade places where that makes the windows disjoint.

    ``P(I, K, S, p, D)[k, o, i] = P(I, O, D, p, S)[o, k, i]``.
    """
    for node in network.patterns:
        axis, (k, o, i) = _axis(node), node.indices
        if _disjoint(axis) or axis.output_size == 1 or axis.dilation < axis.output_size:
            continue
        if any(axis.padding) or axis.input_size < axis.padded_size:
            continue
        swapped = replace(
            axis, kernel_size=axis.output_size, stride=axis.dilation, dilation=axis.stride
        )
        if swapped.output_size == axis.kernel_size and _disjoint(swapped):
            return network.swap(node, Node(Pattern(swapped), (o, k, i)))
    return None


def down_sample(network: Network) -> Network | None:
    """Keep the first ``K`` of every ``S`` inputs where windows leave gaps.

    For ``S > K``, ``p = 0``, ``D = 1`` and ``I = (O - 1) S + K``, with ``i`` not kept:
    ``P(I, K, S)`` of the inputs is ``P(O K, K, K)`` of those in windows; the adjoint pads.
    """
    for node in network.patterns:
        axis, (_, _, i) = _axis(node), node.indices
        count, size, stride = axis.output_size, axis.kernel_size, axis.stride
        if not (_disjoint(axis) and _exact(axis) and stride > size and count > 1):
            continue
        if network.editable(i, node, pads=True):
            dense = Pattern(Axis(count * size, size, stride=size))
            sampling = _sampling(i, count, size, stride)
            return network.edit(sampling, node, Node(dense, node.indices))
    return None


def dense(network: Network) -> Network | None:
    """Split the input of a convolution whose windows tile it.

    For ``S = K``, ``p = 0``, ``D = 1`` and ``I = O K``: ``P[k, o, (o~ k~)]`` is
    ``delta[o, o~] delta[k, k~]``.
    """
    for node in network.patterns:
        axis, (k, o, i) = _axis(node), node.indices
        count, size = axis.output_size, axis.kernel_size
        tiles = _disjoint(axis) and count > 1 and axis.stride == size
        if tiles and axis.input_size == count * size and network.editable(i, node):
            block, entry = network.fresh(f"{o}~"), network.fresh(f"{k}~")
            tiling = Edit((i,), (block, entry), _call(Split, (count, size)), _call(Merge))
            deltas = Node(Delta(count), (o, block)), Node(Delta(size), (k, entry))
            return network.edit(tiling, node, *deltas)
    return None


def whole(network: Network) -> Network | None:
    """Turn the pattern of a kernel that covers its input into a delta.

    For ``O = 1``, ``K = I`` and ``p = 0``, at any stride: ``P[k, 0, i] = delta[k, i]``.
    """
    for node in network.patterns:
        axis, (k, o, i) = _axis(node), node.indices
        plain = axis.dilation == 1 or axis.kernel_size == 1
        covered = axis.kernel_size == axis.input_size and not any(axis.padding)
        if axis.output_size == 1 and plain and covered and network.editable(o, node):
            unit = Edit((o,), (), _call(Drop), _call(Insert))
            return network.edit(unit, node, Node(Delta(axis.input_size), (k, i)))
    return None


def _axis(node: Node) -> Axis:
    """Return the axis of a pattern's node."""
    assert isinstance(node.operand, Pattern)  # `Network.patterns` yields nothing else
    return node.operand.axis


def _disjoint(axis: Axis) -> bool:
    """Whether the windows are unpadded, without holes, and do not overlap."""
    plain = axis.dilation == 1 or axis.kernel_size == 1
    return plain and not any(axis.padding) and axis.stride >= axis.kernel_size


def _exact(axis: Axis) -> bool:
    """Whether the last window ends with the padded input."""
    return axis.padded_size == (axis.output_size - 1) * axis.stride + axis.span


def _shifted(axis: Axis, offset: int, kernel_size: int, output_size: int) -> Axis | None:
    """Return the axis that begins ``offset`` positions later, if one has these sizes."""
    left = axis.padding[0] - offset
    span = (kernel_size - 1) * axis.dilation + 1
    right = max(0, (output_size - 1) * axis.stride + span - left - axis.input_size)
    if left < 0:
        return None
    shifted = replace(axis, kernel_size=kernel_size, padding=(left, right))
    return shifted if shifted.output_size == output_size else None


def _narrow(network: Network, node: Node, role: str, start: int, axis: Axis) -> Network:
    """Keep a range of one of the pattern's indices, in leaves and output too."""
    at = ROLES.index(role)
    before, length = node.operand.shape[at], Pattern(axis).shape[at]
    index = (node.indices[at],)
    pad = _call(Pad, start, before - start - length)
    edit = Edit(index, index, _call(Narrow, start, length), pad)
    return network.edit(edit, node, Node(Pattern(axis), node.indices))


def _sampling(index: str, count: int, size: int, stride: int) -> Edit:
    """Return the edit that keeps ``size`` of every ``stride`` positions."""

    def keep(dim: int) -> tuple[Step, ...]:
        return Windows(dim, size, stride), Merge(dim)

    def spread(dim: int) -> tuple[Step, ...]:
        gap = stride - size
        return Split(dim, (count, size)), Pad(dim + 1, 0, gap), Merge(dim), Pad(dim, 0, -gap)

    return Edit((index,), (index,), keep, spread)


def _call(step: Any, *arguments: Any) -> Steps:
    """Return the function of a dimension that gives one step."""
    return lambda dim: (step(dim, *arguments),)

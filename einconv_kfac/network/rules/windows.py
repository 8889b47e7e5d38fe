"""Rules that narrow, simplify or remove an index pattern."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from einconv_kfac.geometry import Axis
from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Edit, Node, Steps
from einconv_kfac.network.operand import PATTERN_ROLES, Delta, Pattern
from einconv_kfac.network.step import Drop, Insert, Merge, Narrow, Pad, Split, Step, Windows


def crop(network: Network) -> Network | None:
    """Drop the inputs after the last window.

    ``P(I) x = P(E) x[:E]`` with ``E = (O - 1) S + D (K - 1) + 1 - p_left``; the adjoint pads
    with zeros.
    """
    for node in network.patterns:
        axis, (_, _, i) = _axis(node), node.indices
        used = max(1, axis.covered_size - axis.padding[0])
        if used < axis.input_size and network.editable(i, node, pads=True):
            cropped = replace(axis, input_size=used, padding=(axis.padding[0], 0))
            if cropped.output_size == axis.output_size:
                return _narrow(network, node, "i", 0, cropped)
    return None


def trim_kernel(network: Network) -> Network | None:
    """Drop the outermost kernel entries that meet only padding.

    By the shift ``P[k+1, o, i+D] = P[k, o, i]``: with ``k0`` such entries in front,
    ``P(K, p)[k + k0, o, i] = P(K - k0, p - k0 D)[k, o, i]``.
    """
    for node in network.patterns:
        axis = _axis(node)
        met = [k for k in range(axis.kernel_size) if axis.outputs(k)]
        if trimmed := _trimmed(network, node, "k", met):
            return trimmed
    return None


def trim_output(network: Network) -> Network | None:
    """Drop the outermost outputs that meet only padding.

    By the shift ``P[k, o+1, i+S] = P[k, o, i]``: with ``o0`` such outputs in front,
    ``P(O, p)[k, o + o0, i] = P(O - o0, p - o0 S)[k, o, i]``.
    """
    for node in network.patterns:
        axis = _axis(node)
        met = sorted({o for k in range(axis.kernel_size) for o in axis.outputs(k)})
        if trimmed := _trimmed(network, node, "o", met):
            return trimmed
    return None


def swap(network: Network) -> Network | None:
    """Exchange kernel and output where that makes the windows disjoint.

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

    For ``S > K``, ``p = 0``, ``D = 1`` and ``I = (O - 1) S + K``, with ``i`` not in the output:
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
    """Split the input into windows where they tile it.

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
    """Replace the pattern of a kernel as large as its input by a delta.

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
    """Return whether the windows are unpadded, without gaps inside, and do not overlap."""
    plain = axis.dilation == 1 or axis.kernel_size == 1
    return plain and not any(axis.padding) and axis.stride >= axis.kernel_size


def _exact(axis: Axis) -> bool:
    """Return whether the last window ends with the padded input."""
    return axis.padded_size == axis.covered_size


def _trimmed(network: Network, node: Node, role: str, met: list[int]) -> Network | None:
    """Keep the range of one of the pattern's indices that meets inputs, if it can be kept."""
    axis, at = _axis(node), PATTERN_ROLES.index(role)
    sizes = {"k": axis.kernel_size, "o": axis.output_size}
    if not met or len(met) == sizes[role]:
        return None
    first, size = met[0], met[-1] - met[0] + 1
    offset = first * (axis.dilation if role == "k" else axis.stride)
    kept = sizes | {role: size}
    narrow = _shifted(axis, offset, kept["k"], kept["o"])
    if narrow and size < sizes[role] and network.editable(node.indices[at], node, pads=True):
        return _narrow(network, node, role, first, narrow)
    return None


def _shifted(axis: Axis, offset: int, kernel_size: int, output_size: int) -> Axis | None:
    """Return the axis that begins ``offset`` positions later, or None if none has these sizes."""
    left = axis.padding[0] - offset
    span = (kernel_size - 1) * axis.dilation + 1
    right = max(0, (output_size - 1) * axis.stride + span - left - axis.input_size)
    if left < 0:
        return None
    shifted = replace(axis, kernel_size=kernel_size, padding=(left, right))
    return shifted if shifted.output_size == output_size else None


def _narrow(network: Network, node: Node, role: str, start: int, axis: Axis) -> Network:
    """Keep a range of one of the pattern's indices, also on leaves and in the output."""
    at = PATTERN_ROLES.index(role)
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
    """Return the function from a dimension to one step."""
    return lambda dim: (step(dim, *arguments),)

"""Complex conjugates among the tensors of a network."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import NamedTuple

from einconv_kfac.network import Leaf, Network, Node


class Copy(NamedTuple):
    """One of the places where a network has a tensor: the tensor's slot, and the place's number."""

    slot: int
    number: int = 0


INPUT_VJP = (Copy(1),)
"""The kernel of an input VJP, of which the vector is the first tensor."""

WEIGHT_VJP = (Copy(0),)
"""The input of a weight VJP, of which the vector is the second tensor."""

TRANSPOSED_WEIGHT_VJP = (Copy(1),)
"""The input of a transposed convolution's weight VJP, of which the vector is the first tensor."""

WEIGHT_VJP_PAIR = (Copy(0, 0), Copy(1, 1))
"""The input of a weight VJP, and the vector of its conjugate: ``J J^H`` if ``J`` is the VJP."""


def with_conjugates(network: Network, copies: tuple[Copy, ...]) -> Network:
    """Return the network with the conjugates of tensors in some places.

    The conjugates' slots follow those of the tensors, in the same order.
    """
    if not copies:
        return network
    count = 1 + max(node.operand.slot for node in network.nodes if isinstance(node.operand, Leaf))
    seen: Counter[int] = Counter()

    def conjugated(node: Node) -> Node:
        if not isinstance(node.operand, Leaf):
            return node
        slot = node.operand.slot
        copy = Copy(slot, seen[slot])
        seen[slot] += 1
        leaf = replace(node.operand, slot=slot + count) if copy in copies else node.operand
        return replace(node, operand=leaf)

    return replace(network, nodes=tuple(map(conjugated, network.nodes)))

"""Rules for patterns with an index of their own, and for pairs of patterns that share indices."""

from __future__ import annotations

from itertools import combinations

from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Node
from einconv_kfac.network.operand import PATTERN_ROLES, Delta, Pattern


def sum_patterns(network: Network) -> Network | None:
    """Sum a pattern over an index that appears nowhere else: ``sum_o P[k, o, i]``, a matrix.

    A pattern that is summed over all its indices is a factor of the scale.
    """
    for node in network.nodes:
        pattern = node.operand
        if not isinstance(pattern, Pattern):
            continue
        if not node.indices:
            axis = pattern.axis
            ones = sum(len(axis.outputs(kernel)) for kernel in range(axis.kernel_size))
            return network.swap(node, scale=ones)
        for role, index in zip(pattern.roles, node.indices):
            if network.lonely(index, node):
                rest = tuple(i for i in node.indices if i != index)
                return network.swap(node, Node(pattern.sum(role), rest))
    return None


def unite_patterns(network: Network) -> Network | None:
    """Replace one of two equal patterns that share two indices by a delta.

    Patterns that share ``o`` are non-zero only where ``i - i' = D (k - k')``, so with
    ``i = i'``: ``P[k, o, i] P[k', o, i] = P[k, o, i] delta[k, k']``. Likewise for the other
    two pairs of indices.
    """
    for first, second in combinations(network.patterns, 2):
        same = [a == b for a, b in zip(first.indices, second.indices)]
        if first.operand != second.operand or sum(same) < len(PATTERN_ROLES) - 1:
            continue
        if all(same):
            return network.swap(second)
        pair = next(p for p, s in zip(zip(first.indices, second.indices), same) if not s)
        return network.swap(second, Node(Delta(network.sizes[pair[0]]), pair))
    return None

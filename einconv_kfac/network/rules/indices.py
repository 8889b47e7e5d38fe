"""Rules that remove Kronecker deltas and indices."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Edit, Node
from einconv_kfac.network.operand import Delta, Leaf
from einconv_kfac.network.step import Drop, Insert, Merge, Split


def drop_duplicate_deltas(network: Network) -> Network | None:
    """Drop a delta that appears twice: ``delta[a, b] delta[b, a] = delta[a, b]``."""
    seen = set()
    for node in _deltas(network):
        if (pair := frozenset(node.indices)) in seen:
            return network.swap(node)
        seen.add(pair)
    return None


def sum_lonely_deltas(network: Network) -> Network | None:
    """Replace a delta that shares no index by a factor: ``sum_ab delta[a, b]`` is its size."""
    for node in _deltas(network):
        size = network.sizes[node.indices[0]]
        if all(i not in network.output and not network.carriers(i, node) for i in node.indices):
            return network.swap(node, scale=size)
    return None


def contract_deltas(network: Network) -> Network | None:
    """Rename the summed index of a delta: ``sum_b delta[a, b] x[b] = x[a]``.

    A delta between two indices of the output remains.
    """
    for node in _deltas(network):
        first, second = node.indices
        if first == second or second not in network.output:
            kept, gone = first, second
        elif first not in network.output:
            kept, gone = second, first
        else:
            continue
        if network.carriers(kept, node) or network.carriers(gone, node):
            return network.rename(gone, kept, without=node)
    return None


def merge_parallel(network: Network) -> Network | None:
    """Merge two indices that are adjacent and in the same order wherever they appear."""
    for node in network.nodes:
        if isinstance(node.operand, Leaf):
            for pair in pairwise(node.indices):
                if _parallel(network, pair):
                    return _merged(network, pair)
    return None


def drop_units(network: Network) -> Network | None:
    """Drop an index of size one from leaves and output."""
    for index, size in network.sizes.items():
        if size != 1:
            continue
        fixed = [n for n in network.carriers(index) if not isinstance(n.operand, Leaf)]
        if len(fixed) == len(network.carriers(index)) and index not in network.output:
            continue
        if network.editable(index, *fixed):
            return network.edit(
                Edit((index,), (), lambda dim: (Drop(dim),), lambda dim: (Insert(dim),))
            )
    return None


def _deltas(network: Network) -> Iterator[Node]:
    """Return the nodes that are Kronecker deltas."""
    return (node for node in network.nodes if isinstance(node.operand, Delta))


def _parallel(network: Network, pair: tuple[str, str]) -> bool:
    """Return whether the indices are adjacent wherever one of them appears, on leaves only."""
    for indices in [*(node.indices for node in network.nodes), network.output]:
        counts = [indices.count(index) for index in pair]
        if counts == [0, 0]:
            continue
        if counts != [1, 1] or pair not in pairwise(indices):
            return False
    return all(isinstance(node.operand, Leaf) for node in network.carriers(pair[0]))


def _merged(network: Network, pair: tuple[str, str]) -> Network:
    """Merge two parallel indices."""
    sizes = tuple(network.sizes[index] for index in pair)
    name = f"({' '.join(index.strip('()') for index in pair)})"
    return network.edit(
        Edit(pair, (name,), lambda dim: (Merge(dim),), lambda dim: (Split(dim, sizes),))
    )

"""Lowering: index patterns replaced by window views and folds."""

from __future__ import annotations

from einconv_kfac.geometry import Axis
from einconv_kfac.network.cache import cached
from einconv_kfac.network.network import Network
from einconv_kfac.network.node import Edit, Steps
from einconv_kfac.network.operand import Pattern
from einconv_kfac.network.rules.sums import sum_patterns
from einconv_kfac.network.step import Fold, Pad, Step, Windows


@cached(maxsize=1024)
def lowered(network: Network) -> Network:
    """Return the network with as few index patterns as possible.

    A pattern with an index that appears nowhere else is summed over it and becomes a small
    matrix. A pattern whose input index appears on one leaf only becomes a window view of the
    padded leaf. A pattern whose input index is in the output, and whose kernel and output
    indices are summed, becomes a fold of the result. Other patterns remain as dense tensors.
    """
    for rule in (sum_patterns, _window, _fold):
        while (simpler := rule(network)) is not None:
            network = simpler
    return network


def _window(network: Network) -> Network | None:
    """Replace the first pattern that is a window view of a leaf."""
    for node in network.patterns:
        k, o, i = node.indices
        carriers = network.carriers(i, node)
        alone = len(carriers) == 1 and i not in network.output and len(set(node.indices)) == 3
        if alone and network.editable(i, node) and not {k, o} & set(carriers[0].indices):
            assert isinstance(node.operand, Pattern)
            edit = Edit((i,), (o, k), _windows(node.operand.axis), _nothing)
            return network.edit(edit, node)
    return None


def _fold(network: Network) -> Network | None:
    """Replace the first pattern that is a fold of the result."""
    for node in network.patterns:
        k, o, i = node.indices
        kept = set(network.output)
        summed = not {k, o} & kept and network.carriers(k, node) and network.carriers(o, node)
        once = network.output.count(i) == 1 and not network.carriers(i, node)
        if summed and once and len(set(node.indices)) == 3:
            assert isinstance(node.operand, Pattern)
            edit = Edit((i,), (o, k), _nothing, _folding(node.operand.axis))
            return network.edit(edit, node)
    return None


def _windows(axis: Axis) -> Steps:
    """Return the steps from inputs to windows, ``[i]`` to ``[o, k]``."""
    left, right = axis.exact_padding

    def steps(dim: int) -> tuple[Step, ...]:
        view = Windows(dim, axis.kernel_size, axis.stride, axis.dilation)
        return (Pad(dim, left, right), view) if left or right else (view,)

    return steps


def _folding(axis: Axis) -> Steps:
    """Return the steps from windows to inputs, ``[o, k]`` to ``[i]``."""
    left, right = axis.exact_padding
    return lambda dim: (
        Fold(dim, axis.covered_size, axis.stride, axis.dilation),
        Pad(dim, -left, -right),
    )


def _nothing(dim: int) -> tuple[Step, ...]:
    """Return no step."""
    return ()

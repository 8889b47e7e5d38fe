"""The order of contraction: pairwise contractions, chosen from sizes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from opt_einsum.paths import auto  # type: ignore[import-untyped]

from einconv_kfac.network.cache import cached
from einconv_kfac.network.equation import equation
from einconv_kfac.network.network import Network


class Contraction(NamedTuple):
    """One contraction: its operands are popped from the list in order, its result is appended.

    Contractions with the same ``value`` have the same result, for example the two halves of a
    Gram matrix; only the first is computed.
    """

    positions: tuple[int, ...]
    equation: str
    value: int


@cached(maxsize=1024)
def contraction_path(network: Network) -> tuple[Contraction, ...]:
    """Return contractions of one or two operands each that evaluate the network."""
    remaining = [node.indices for node in network.nodes]
    numbers: dict[Any, int] = {}
    values = [numbers.setdefault(node.operand, len(numbers)) for node in network.nodes]
    path = []
    for positions in _order(network) or [(0,)]:  # a single operand may be summed or permuted
        # in an order that equal contractions share
        taken = _popped(sorted(positions, key=lambda position: (values[position], position)))
        operands = [remaining.pop(position) for position in taken]
        result = _kept(operands, remaining, network.output)
        remaining.append(result)
        written = equation(operands, result)
        key = written, *(values.pop(position) for position in taken)
        values.append(numbers.setdefault(key, len(numbers)))
        path.append(Contraction(taken, written, values[-1]))
    return tuple(path)


def _order(network: Network) -> list[tuple[int, ...]]:
    """Return the positions of the operands of each contraction; results are appended.

    The search takes the operands in reverse order: among equally good paths it then finds one
    that contracts the last dimensions first, which needs no copy of a contiguous tensor.
    """
    backwards = [frozenset(node.indices) for node in reversed(network.nodes)]
    names = list(reversed(range(len(backwards))))
    alive, order = sorted(names), []
    for positions in auto(backwards, frozenset(network.output), network.sizes):
        taken = [names[position] for position in positions]
        order.append(tuple(alive.index(name) for name in taken))
        result = len(network.nodes) + len(order)
        names = [*(name for name in names if name not in taken), result]
        alive = [*(name for name in alive if name not in taken), result]
    return order


def _popped(positions: list[int]) -> tuple[int, ...]:
    """Return the positions as they are when the operands are popped one after the other."""
    return tuple(
        position - sum(1 for earlier in positions[:at] if earlier < position)
        for at, position in enumerate(positions)
    )


def _kept(
    operands: list[tuple[str, ...]], others: list[tuple[str, ...]], output: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the indices of the operands that other operands or the output have."""
    if not others:
        return output
    needed = set(output).union(*others)
    return tuple(dict.fromkeys(i for indices in operands for i in indices if i in needed))

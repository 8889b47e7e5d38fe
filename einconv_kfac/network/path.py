"""In which order to contract: pairwise contractions, from sizes alone."""

from __future__ import annotations

from typing import Any, NamedTuple

from opt_einsum.paths import auto  # type: ignore[import-untyped]

from einconv_kfac.network.cache import cached
from einconv_kfac.network.equation import equation
from einconv_kfac.network.network import Network


class Contraction(NamedTuple):
    """One contraction: its operands leave the list, in this order, and the result is appended.

    Contractions with the same ``value`` have the same result, as those of the two halves of a
    Gram matrix; the first computes it.
    """

    positions: tuple[int, ...]
    equation: str
    value: int


@cached(maxsize=1024)
def contraction_path(network: Network) -> tuple[Contraction, ...]:
    """Return the contractions, one or two operands each, that give the network's output."""
    remaining = [node.indices for node in network.nodes]
    inputs, output = [frozenset(indices) for indices in remaining], frozenset(network.output)
    order = auto(inputs, output, network.sizes)
    numbers: dict[Any, int] = {}
    values = [numbers.setdefault(node.operand, len(numbers)) for node in network.nodes]
    path = []
    for positions in order or [(0,)]:  # a single operand may still be summed or permuted
        taken = tuple(sorted(positions, reverse=True))
        operands = [remaining.pop(position) for position in taken]
        result = _kept(operands, remaining, network.output)
        remaining.append(result)
        written = equation(operands, result)
        key = written, *(values.pop(position) for position in taken)
        values.append(numbers.setdefault(key, len(numbers)))
        path.append(Contraction(taken, written, values[-1]))
    return tuple(path)


def _kept(
    operands: list[tuple[str, ...]], others: list[tuple[str, ...]], output: tuple[str, ...]
) -> tuple[str, ...]:
    """Return the indices of the operands that are needed later."""
    if not others:
        return output
    needed = set(output).union(*others)
    return tuple(dict.fromkeys(i for indices in operands for i in indices if i in needed))

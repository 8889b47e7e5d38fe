"""The cost of evaluating a network, in words and numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

from einconv_kfac.network.equation import parse_equation
from einconv_kfac.network.lowering import lowered
from einconv_kfac.network.network import Network, check_network
from einconv_kfac.network.path import contraction_path


@dataclass(frozen=True)
class Explanation:
    """The cost of a network's evaluation; ``print`` shows it as text.

    Args:
        network: The network.
        lowered: The network with its patterns replaced by views and folds.
        contractions: Equation and multiply-accumulates of each pairwise contraction, in order.
        largest: Number of entries of the largest intermediate or result.
    """

    network: Network
    lowered: Network
    contractions: tuple[tuple[str, int], ...]
    largest: int

    @property
    def multiply_accumulates(self) -> int:
        """Multiply-accumulates of all contractions."""
        return sum(count for _, count in self.contractions)

    def __str__(self) -> str:
        nodes = self.network.nodes
        sizes = "  ".join(f"{index}={size}" for index, size in self.network.sizes.items())
        return "\n".join(
            [
                str(self.network),
                "sizes: " + sizes,
                "operands: " + "  ".join(f"{n.operand.name}{list(n.operand.shape)}" for n in nodes),
                "rules: " + (", ".join(self.network.fired) or "none"),
                f"contracted as: {self.lowered}",
                *(f"  {equation}: {count:,}" for equation, count in self.contractions),
                f"multiply-accumulates: {self.multiply_accumulates:,}",
                f"largest intermediate: {self.largest:,} entries",
            ]
        )


def explain(network: Network) -> Explanation:
    """Return operands, sizes, contractions and cost of a network's evaluation.

    The cost counts multiply-accumulates and the entries of the largest intermediate; equal
    contractions are computed and counted once. An index that only one operand of a contraction has
    is summed before the product, as ``torch.einsum`` does.

    Raises:
        TypeError: If the argument is no network.
    """
    check_network(network)
    views = lowered(network)
    shapes = [node.operand.shape for node in views.nodes]
    contractions, known, largest = [], set(), 0
    for positions, equation, value in contraction_path(views):
        inputs, output = parse_equation(equation)
        taken = [shapes.pop(position) for position in positions]
        sizes = {i: s for names, shape in zip(inputs, taken) for i, s in zip(names, shape)}
        shapes.append(tuple(sizes[index] for index in output))
        if value not in known:
            contractions.append((equation, _cost(inputs, output, sizes)))
        known.add(value)
        largest = max(largest, prod(shapes[-1]))
    return Explanation(network, views, tuple(contractions), largest)


def _cost(
    inputs: Sequence[tuple[str, ...]], output: tuple[str, ...], sizes: Mapping[str, int]
) -> int:
    """Return the multiply-accumulates of a contraction of one or two operands."""
    counts = Counter(index for names in inputs for index in set(names))
    first = {i for i, count in counts.items() if count < len(inputs) and i not in output}
    sums = sum(prod(sizes[i] for i in set(names)) for names in inputs if first & set(names))
    return sums + prod(size for index, size in sizes.items() if index not in first)

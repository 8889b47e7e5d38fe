"""A tensor network as an immutable value: operands, their indices, and those of the result."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property

from einconv_kfac.network.node import Edit, Node
from einconv_kfac.network.operand import Leaf, Pattern
from einconv_kfac.network.step import Fold, Pad, Shape, Step


@dataclass(frozen=True)
class Network:
    """A tensor network: names and sizes, without tensors.

    Its value is ``scale`` times the sum over all indices that are not in ``output`` of the
    product of all nodes, taken through ``undo`` and reshaped to ``shape``.

    Args:
        nodes: The operands with their indices.
        output: Indices of the contraction's result.
        shape: Shape of the result.
        scale: An exact factor.
        undo: Steps for the contraction's result, before the last reshape.
        reshape_only: Whether ``undo`` may do no more than reshape, as in
            ``torch.einsum(equation, *operands).reshape(shape)``.
        fired: Names of the rewrite rules that were applied, in order.

    Raises:
        ValueError: If an index has two sizes, or an output index is on no node.
    """

    nodes: tuple[Node, ...]
    output: tuple[str, ...]
    shape: Shape
    scale: Fraction = Fraction(1)
    undo: tuple[Step, ...] = ()
    reshape_only: bool = False
    fired: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        sizes = self.sizes
        if unknown := [index for index in self.output if index not in sizes]:
            raise ValueError(f"`output` must use indices of the operands, got {unknown}.")

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every index, in order of first appearance."""
        sizes: dict[str, int] = {}
        for node in self.nodes:
            for index, size in zip(node.indices, node.operand.shape):
                if sizes.setdefault(index, size) != size:
                    raise ValueError(
                        f"index {index!r} must have one size, got {sizes[index]} and {size}."
                    )
        return sizes

    @property
    def patterns(self) -> Iterator[Node]:
        """Index patterns of which no index is summed out."""
        for node in self.nodes:
            if isinstance(node.operand, Pattern) and not node.operand.summed:
                yield node

    def carriers(self, index: str, *others: Node) -> list[Node]:
        """Return the nodes that have the index, except ``others``."""
        return [n for n in self.nodes if index in n.indices and all(n is not o for o in others)]

    def lonely(self, index: str, node: Node) -> bool:
        """Return whether neither another node nor the output has the node's index."""
        return (
            index not in self.output
            and node.indices.count(index) == 1
            and not self.carriers(index, node)
        )

    def editable(self, index: str, *others: Node, pads: bool = False) -> bool:
        """Return whether an `Edit` can replace the index on all nodes except ``others``.

        Steps can be applied to leaves only. ``pads`` says that undoing them in the output takes
        more than a reshape.
        """
        if pads and self.reshape_only and index in self.output:
            return False
        return self.output.count(index) <= 1 and all(
            isinstance(node.operand, Leaf) and node.indices.count(index) == 1
            for node in self.carriers(index, *others)
        )

    def fresh(self, index: str) -> str:
        """Return a name like ``index`` that no index has."""
        while index in self.sizes:
            index += "~"
        return index

    def edit(self, edit: Edit, node: Node | None = None, *others: Node) -> Network:
        """Return the network after an edit, with ``others`` instead of ``node``."""
        nodes: list[Node] = []
        for candidate in self.nodes:
            if candidate is node:
                nodes.extend(others)
            else:
                nodes.append(edit.apply(candidate))
        output, undo = self.output, self.undo
        if edit.old[0] in output:
            dim = output.index(edit.old[0])
            output, undo = edit.indices(output, dim), edit.undo(dim) + undo
        return replace(self, nodes=tuple(nodes), output=output, undo=undo)

    def swap(self, node: Node, *others: Node, scale: int | Fraction = 1) -> Network:
        """Return the network with ``others`` instead of ``node``, and the scale multiplied."""
        at = next(j for j, other in enumerate(self.nodes) if other is node)
        nodes = self.nodes[:at] + others + self.nodes[at + 1 :]
        return replace(self, nodes=nodes, scale=self.scale * scale)

    def rename(self, old: str, new: str, without: Node) -> Network:
        """Return the network without a node, and with the index ``old`` called ``new``."""

        def renamed(indices: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new if index == old else index for index in indices)

        rest = (node for node in self.nodes if node is not without)
        nodes = tuple(Node(node.operand, renamed(node.indices)) for node in rest)
        return replace(self, nodes=nodes, output=renamed(self.output))

    def after(self, rule: str) -> Network:
        """Return the network with a rule's name appended to ``fired``."""
        return replace(self, fired=(*self.fired, rule))

    def finishing(self) -> tuple[Step, ...]:
        """Return the steps of ``undo`` without those at its end that the last reshape includes."""
        last = max((j for j, s in enumerate(self.undo) if isinstance(s, (Fold, Pad))), default=-1)
        return self.undo[: last + 1]

    def __str__(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale} "
        factors = " ".join(f"{n.operand.name}[{' '.join(n.indices)}]" for n in self.nodes)
        return f"{scale}{factors} -> [{' '.join(self.output)}]"


def check_network(network: object) -> None:
    """Raise a ``TypeError`` if an argument is no network."""
    if not isinstance(network, Network):
        raise TypeError(f"`network` must be a `Network`, got {network!r}.")

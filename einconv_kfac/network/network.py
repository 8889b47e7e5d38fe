"""A contraction as an immutable value: operands, their indices, and what is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from einconv_kfac.network.drawing import Picture, draw
from einconv_kfac.network.operand import Leaf, Operand, Pattern
from einconv_kfac.network.step import Fold, Pad, Shape, Step

if TYPE_CHECKING:  # explanations are built on networks
    from einconv_kfac.network.explanation import Explanation

Steps = Callable[[int], tuple[Step, ...]]


@dataclass(frozen=True)
class Node:
    """An operand and the names of its indices."""

    operand: Operand
    indices: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.operand.shape) != len(self.indices):
            raise ValueError(
                f"`indices` must name the {len(self.operand.shape)} dimensions of "
                f"{self.operand.name}, got {self.indices}."
            )


@dataclass(frozen=True)
class Edit:
    """Neighbouring indices that others replace, and the steps that does to a tensor.

    Args:
        old: Neighbouring indices; a leaf has all of them or none.
        new: What stands in their place after the steps.
        steps: Steps for a leaf, given the dimension of the first old index.
        undo: Steps that bring the contraction's result back, likewise.
    """

    old: tuple[str, ...]
    new: tuple[str, ...]
    steps: Steps
    undo: Steps

    def apply(self, node: Node) -> Node:
        """Return the node, taken through the steps if it is a leaf with the indices."""
        if not isinstance(node.operand, Leaf) or self.old[0] not in node.indices:
            return node
        dim = node.indices.index(self.old[0])
        return Node(node.operand.then(*self.steps(dim)), self.indices(node.indices, dim))

    def indices(self, indices: tuple[str, ...], dim: int) -> tuple[str, ...]:
        """Return the indices with the old ones, from ``dim`` on, replaced."""
        return (*indices[:dim], *self.new, *indices[dim + len(self.old) :])


@dataclass(frozen=True)
class Network:
    """A tensor network, built from names and sizes alone.

    Its value is ``scale`` times the sum over all indices that are not in ``output`` of the
    product of all nodes; ``undo`` and a reshape to ``shape`` then give the result.

    Args:
        nodes: The operands with their indices.
        output: Indices of the contraction's result.
        shape: Shape of the result.
        scale: An exact factor.
        undo: Steps from the contraction's result to the result, before the last reshape.
        reshape_only: Whether ``undo`` may do no more than reshape, as in
            ``torch.einsum(equation, *operands).reshape(shape)``.
        fired: Names of the rewrite rules that led here, in order.

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
        sizes: dict[str, int] = {}
        for node in self.nodes:
            for index, size in zip(node.indices, node.operand.shape):
                if sizes.setdefault(index, size) != size:
                    raise ValueError(
                        f"index {index!r} must have one size, got {sizes[index]} and {size}."
                    )
        if unknown := [index for index in self.output if index not in sizes]:
            raise ValueError(f"`output` must use indices of the operands, got {unknown}.")
        self.__dict__["sizes"] = sizes

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size of every index, in order of first appearance."""
        raise AssertionError  # filled in by __post_init__

    @cached_property
    def output_shape(self) -> Shape:
        """Shape of the contraction's result, before `undo`."""
        return tuple(self.sizes[index] for index in self.output)

    @property
    def patterns(self) -> Iterator[Node]:
        """The nodes that are index patterns with all three indices."""
        for node in self.nodes:
            if isinstance(node.operand, Pattern) and not node.operand.summed:
                yield node

    def carriers(self, index: str, *others: Node) -> list[Node]:
        """The nodes that have the index, ``others`` left out."""
        return [n for n in self.nodes if index in n.indices and all(n is not o for o in others)]

    def lonely(self, index: str, node: Node) -> bool:
        """Whether no other node and not the output has the node's index."""
        return (
            index not in self.output
            and node.indices.count(index) == 1
            and not self.carriers(index, node)
        )

    def editable(self, index: str, *others: Node, pads: bool = False) -> bool:
        """Whether steps can replace the index, ``others`` aside.

        Only leaves can be taken through steps. With ``pads``, undoing them in the output
        takes more than a reshape.
        """
        if pads and self.reshape_only and index in self.output:
            return False
        return self.output.count(index) <= 1 and all(
            isinstance(node.operand, Leaf) and node.indices.count(index) == 1
            for node in self.carriers(index, *others)
        )

    def fresh(self, index: str) -> str:
        """Return a name that no index has, close to ``index``."""
        while index in self.sizes:
            index += "~"
        return index

    def edit(self, edit: Edit, node: Node | None = None, *others: Node) -> Network:
        """Take leaves and output through an edit, and put others in the place of ``node``."""
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
        """Put other nodes in the place of one, and multiply the scale."""
        at = next(j for j, other in enumerate(self.nodes) if other is node)
        nodes = self.nodes[:at] + others + self.nodes[at + 1 :]
        return replace(self, nodes=nodes, scale=self.scale * scale)

    def rename(self, old: str, new: str, without: Node) -> Network:
        """Drop a node, and give an index the name of another."""

        def renamed(indices: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(new if index == old else index for index in indices)

        rest = (node for node in self.nodes if node is not without)
        nodes = tuple(Node(node.operand, renamed(node.indices)) for node in rest)
        return replace(self, nodes=nodes, output=renamed(self.output))

    def after(self, rule: str) -> Network:
        """Return the network with the rule noted."""
        return replace(self, fired=(*self.fired, rule))

    def finishing(self) -> tuple[Step, ...]:
        """The steps of `undo` that a reshape to `shape` does not do already."""
        last = max((j for j, s in enumerate(self.undo) if isinstance(s, (Fold, Pad))), default=-1)
        return self.undo[: last + 1]

    def draw(self) -> Picture:
        """Return a picture: tensors as nodes, indices as edges, sizes on the edges.

        A notebook shows it by itself; ``save("file.svg")`` or ``save("file.png")`` writes it.
        """
        return draw(self)

    def explain(self) -> Explanation:
        """Return operands, sizes, path, cost, and the rules that fired; print it."""
        from einconv_kfac.network.explanation import explain  # noqa: PLC0415 (built on networks)

        return explain(self)

    def __str__(self) -> str:
        scale = "" if self.scale == 1 else f"{self.scale} "
        factors = " ".join(f"{n.operand.name}[{' '.join(n.indices)}]" for n in self.nodes)
        return f"{scale}{factors} -> [{' '.join(self.output)}]"

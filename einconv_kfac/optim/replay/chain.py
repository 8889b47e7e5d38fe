"""Arguments of calls of a model that depend on outputs of earlier calls.

A recurrent loop passes a state from call to call, and an encoder's output is a decoder's input. A
replay runs all these calls, each with the outputs of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from einconv_kfac.curvature.objective.graph import Edge, edge_of, leaf_of
from einconv_kfac.curvature.objective.link import Link
from einconv_kfac.optim.replay.loss_input import LossInput
from einconv_kfac.optim.vectors import Direction

Source: TypeAlias = "tuple[int, LossInput]"
"""The number of a call, and which of its tensors it is."""
SourceAt: TypeAlias = "Callable[[Edge], tuple[Source, Tensor] | None]"
"""Returns which tensor of which call an edge of the graph is, and its value."""


@dataclass(frozen=True)
class ChainedArgument:
    """An argument that depends on outputs of earlier calls, or on parameters.

    Args:
        index: Its index among all positional and keyword arguments, nested ones included.
        sources: The outputs and names of parameters that it depends on.
        link: The argument as a function of them; ``None`` if it is the one source itself.
    """

    index: int
    sources: tuple[Source | str, ...]
    link: Link | None

    def value(self, model: nn.Module, parameters: Direction, earlier: Mapping[Any, Tensor]) -> Any:
        """Return the argument.

        Args:
            model: The model.
            parameters: The parameters that take other values.
            earlier: Outputs of earlier calls.
        """
        given = [
            parameters.get(source, model.get_parameter(source))
            if isinstance(source, str)
            else earlier[source]
            for source in self.sources
        ]
        return given[0] if self.link is None else self.link(given)


def chained_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    source_at: SourceAt,
    names: Callable[[], Mapping[Tensor, str]],
) -> tuple[ChainedArgument, ...]:
    """Return the arguments of a call that depend on earlier calls, while the graph exists.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        source_at: Finds outputs of earlier calls.
        names: Returns the parameters of the model, with their names.
    """
    leaves, _ = tree_flatten((args, kwargs))
    curved = [(i, e) for i, e in enumerate(leaves) if isinstance(e, Tensor) and e.requires_grad]
    if not curved:
        return ()
    parameters = names()
    found = (_chained(index, leaf, source_at, parameters) for index, leaf in curved)
    return tuple(each for each in found if each is not None)


def _chained(
    index: int, tensor: Tensor, source_at: SourceAt, parameters: Mapping[Tensor, str]
) -> ChainedArgument | None:
    """Return an argument if it depends on earlier calls or parameters, or ``None``."""
    if tensor.is_leaf:
        return ChainedArgument(index, (parameters[tensor],), None) if tensor in parameters else None
    root = edge_of(tensor)
    if (own := source_at(root)) is not None:
        return ChainedArgument(index, (own[0],), None)

    def output(edge: Edge) -> Tensor | None:
        known = source_at(edge)
        return None if known is None else known[1]

    def named(edge: Edge) -> Source | str:
        known, leaf = source_at(edge), leaf_of(edge)
        if known is not None:
            return known[0]
        assert leaf is not None
        return parameters[leaf]

    link = Link.of(root, tensor.detach(), output, parameters)
    if link is None:
        return None
    return ChainedArgument(index, tuple(named(edge) for edge in link.sources), link)


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[int, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments, some of which are replaced.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        values: By the index of `ChainedArgument`.
    """
    if not values:
        return args, kwargs
    leaves, spec = tree_flatten((args, kwargs))
    for index, value in values.items():
        leaves[index] = value
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
    return found


def needed(chains: Sequence[ChainedArgument]) -> set[Source]:
    """Return the outputs of earlier calls that arguments depend on."""
    return {source for each in chains for source in each.sources if not isinstance(source, str)}

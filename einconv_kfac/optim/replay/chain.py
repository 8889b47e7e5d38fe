"""Arguments and buffers of calls of a model that depend on outputs of earlier calls.

A recurrent loop passes a state from call to call, as an argument or in a buffer, and an encoder's
output is a decoder's input. A replay runs all these calls, each with outputs of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from einconv_kfac.curvature.objective.graph import Edge, Stops, edge_of, first_met, leaf_of
from einconv_kfac.curvature.objective.link import Link
from einconv_kfac.optim.replay.loss_input import LossInput, Vector, derivatives_of
from einconv_kfac.optim.vectors import Direction

Source: TypeAlias = "tuple[int, LossInput]"
"""The number of a call, and which of its tensors it is."""
SourceAt: TypeAlias = "Callable[[Edge], tuple[Source, Tensor] | None]"
"""Returns which tensor of which call an edge of the graph is, and its value."""
TensorOf: TypeAlias = "Callable[[Source], Tensor]"
"""Returns a tensor of a call."""


@dataclass(frozen=True)
class Dependence:
    """How a tensor depends on tensors of calls, or on parameters.

    Args:
        sources: The tensors and names of parameters that it depends on.
        link: The tensor as a function of them; ``None`` if it is the one source itself.
    """

    sources: tuple[Source | str, ...]
    link: Link | None

    def value(self, model: nn.Module, parameters: Direction, tensor: TensorOf) -> Tensor:
        """Return the tensor.

        Args:
            model: The model.
            parameters: The parameters that take other values.
            tensor: Returns tensors of calls.
        """
        given = [
            parameters.get(source, model.get_parameter(source))
            if isinstance(source, str)
            else tensor(source)
            for source in self.sources
        ]
        return given[0] if self.link is None else self.link(given)


@dataclass(frozen=True)
class ChainedArgument:
    """An argument or a buffer that depends on tensors of earlier calls, or on parameters.

    Args:
        index: Its index among all positional and keyword arguments, nested ones included; the name
            of a buffer in the model.
        own: How it depends on them.
    """

    index: int | str
    own: Dependence


def chained_arguments(
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    buffers: Mapping[str, Tensor],
    source_at: SourceAt,
    names: Callable[[], Mapping[Tensor, str]],
    is_past: Stops,
) -> tuple[ChainedArgument, ...]:
    """Return the arguments and buffers of a call that depend on earlier calls.

    They are found while the graph exists.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        buffers: The buffers that require gradients, by name.
        source_at: Finds outputs of earlier calls.
        names: Returns the parameters of the model, with their names.
        is_past: Whether an edge is a tensor of a call before the last step.
    """
    leaves, _ = tree_flatten((args, kwargs))
    given: Iterable[tuple[int | str, Any]] = [*enumerate(leaves), *buffers.items()]
    curved = [(i, e) for i, e in given if isinstance(e, Tensor) and e.requires_grad]
    if not curved:
        return ()
    parameters = names()
    found = ((i, dependence_of(leaf, source_at, parameters, is_past)) for i, leaf in curved)
    return tuple(ChainedArgument(index, own) for index, own in found if own is not None)


def dependence_of(
    tensor: Tensor,
    source_at: SourceAt,
    parameters: Mapping[Tensor, str],
    is_past: Stops = lambda _: False,
) -> Dependence | None:
    """Return how a tensor depends on calls or parameters, while the graph exists.

    A tensor that was computed before the last step is a constant where its graph cannot be read,
    as a step changes parameters in place. Nor can a loss be backpropagated through that graph.

    Args:
        tensor: A tensor that requires gradients.
        source_at: Finds tensors of calls.
        parameters: The parameters of the model, with their names.
        is_past: Whether an edge is a tensor of a call before the last step.

    Returns:
        ``None`` if it depends on neither.
    """
    if tensor.is_leaf:
        return Dependence((parameters[tensor],), None) if tensor in parameters else None
    root = edge_of(tensor)
    if (own := source_at(root)) is not None:
        return Dependence((own[0],), None)

    def output(edge: Edge) -> Tensor | None:
        known = source_at(edge)
        return None if known is None else known[1]

    def named(edge: Edge) -> Source | str:
        known, leaf = source_at(edge), leaf_of(edge)
        if known is not None:
            return known[0]
        assert leaf is not None
        return parameters[leaf]

    try:
        link = Link.of(root, tensor.detach(), output, parameters)
    except RuntimeError:
        met = first_met([root], lambda edge: source_at(edge) is not None or is_past(edge))
        if any(is_past(edge) for edge in met):
            return None
        raise
    if link is None:
        return None
    return Dependence(tuple(named(edge) for edge in link.sources), link)


def replaced(
    args: tuple[Any, ...], kwargs: dict[str, Any], values: Mapping[int | str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return arguments, some of which are replaced.

    Args:
        args: The positional arguments.
        kwargs: The keyword arguments.
        values: By the index of `ChainedArgument`; those of buffers are left out.
    """
    own = {index: value for index, value in values.items() if isinstance(index, int)}
    if not own:
        return args, kwargs
    leaves, spec = tree_flatten((args, kwargs))
    for index, value in own.items():
        leaves[index] = value
    found: tuple[tuple[Any, ...], dict[str, Any]] = tree_unflatten(leaves, spec)
    return found


def needed(dependences: Iterable[Dependence]) -> dict[Source, None]:
    """Return the tensors of calls that others depend on."""
    return {s: None for each in dependences for s in each.sources if not isinstance(s, str)}


def dependences_of(
    vectors: Mapping[Vector, Dependence], sources: Iterable[LossInput]
) -> list[Dependence]:
    """Return how vectors depend on calls that derivatives among tensors of a call are taken with.

    Args:
        vectors: How vectors depend on calls; others are constants.
        sources: The tensors.
    """
    used = {vector: None for own in derivatives_of(sources) for _, vector in own.weights}
    return [vectors[vector] for vector in used if vector in vectors]

"""Tensors of a call of the model on which a loss depends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from einconv_kfac.curvature.layers.interception import closed_interceptions
from einconv_kfac.curvature.losses.loss_call import is_sum
from einconv_kfac.curvature.objective.outputs import tensors_of

Run: TypeAlias = Callable[[], Any]
"""Runs the model and returns what the model returns."""
Found: TypeAlias = Callable[[Tensor], None]
"""Receives a tensor while the model runs."""

REDUCTIONS = (
    "`loss_fn.reduction` must be the same from the calls of the loss to their backward passes, and "
    "for all losses of a step, got a mean and a sum. Change it after `step` alone."
)


class InnerInput(Protocol):
    """Finds a tensor while the model runs."""

    def watch(self, found: Found) -> RemovableHandle:
        """Attach a hook that passes the tensor on."""

    def missing(self) -> str:
        """Return what is not found again."""


@dataclass(frozen=True)
class Returned:
    """A tensor that the model returns.

    Args:
        index: Its index among the tensors of the output, in the order of `tensors_of`.
    """

    index: int


@dataclass(frozen=True)
class Inside:
    """The first argument of a loss that the model calls.

    Args:
        loss_fn: The loss.
        index: The number of earlier calls of the loss in the same call of the model.
    """

    loss_fn: nn.Module
    index: int

    def watch(self, found: Found) -> RemovableHandle:
        """See `InnerInput`."""
        count = _Countdown(self.index)

        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if count.is_over_():
                found(loss_arguments(self.loss_fn, args, kwargs)[0])

        return self.loss_fn.register_forward_pre_hook(hook, with_kwargs=True)

    def missing(self) -> str:
        """See `InnerInput`."""
        return f"call number {self.index + 1} of `loss_fn`"


@dataclass(frozen=True)
class LayerOutput:
    """The output of a layer inside the model.

    Args:
        module: The layer.
        index: The number of earlier calls of the layer in the same call of the model.
    """

    module: nn.Module
    index: int

    def watch(self, found: Found) -> RemovableHandle:
        """See `InnerInput`."""
        count = _Countdown(self.index)

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            if count.is_over_():
                found(output)

        return self.module.register_forward_hook(hook, prepend=True)  # as the pass was recorded

    def missing(self) -> str:
        """See `InnerInput`."""
        return f"call number {self.index + 1} of a layer ({type(self.module).__name__})"


@dataclass(frozen=True)
class CarriedBuffer:
    """A buffer after a call, which later calls begin with, as a membrane's potential.

    Args:
        called: The module that was called.
        owner: The module that has the buffer.
        name: The buffer's name there.
    """

    called: nn.Module
    owner: nn.Module
    name: str

    def watch(self, found: Found) -> RemovableHandle:
        """See `InnerInput`."""

        def hook(_: nn.Module, __: tuple[Any, ...], ___: Any) -> None:
            if (buffer := self.owner._buffers.get(self.name)) is not None:
                found(buffer)

        return self.called.register_forward_hook(hook)

    def missing(self) -> str:
        """See `InnerInput`."""
        return f"the buffer '{self.name}' of a {type(self.owner).__name__}"


@dataclass(frozen=True, eq=False)
class Vector:
    """A vector that a derivative was taken with.

    Args:
        value: Its value in the recorded pass, detached.
    """

    value: Tensor


@dataclass(frozen=True, eq=False)
class Derivative:
    """``sum_i J_i^T v_i``, where ``J_i`` is the derivative of a tensor of a call by an input of it.

    Args:
        by: The index of an argument among all positional and keyword arguments, nested ones
            included, or a vector of an earlier derivative of the same call.
        weights: The tensors, returned ones or derivatives themselves, and the vectors ``v_i``.
    """

    by: int | Vector
    weights: tuple[tuple[LossInput, Vector], ...]

    def all_of(self) -> Iterator[Derivative]:
        """Yield the derivative, and all earlier ones that it is taken of."""
        yield self
        for source, _ in self.weights:
            if isinstance(source, Derivative):
                yield from source.all_of()


Direct: TypeAlias = Returned | Inside | LayerOutput | CarriedBuffer
"""How a tensor follows from a run of the model itself."""
LossInput: TypeAlias = Direct | Derivative
"""How a tensor on which a loss depends follows from a call of the model."""
OUTER = (Returned, Derivative, CarriedBuffer)
"""Tensors that exist after a call."""


def derivatives_of(sources: Iterable[LossInput]) -> Iterator[Derivative]:
    """Yield the derivatives among tensors of a call, and all that they are taken of."""
    for source in sources:
        if isinstance(source, Derivative):
            yield from source.all_of()


def without_derivatives(sources: Sequence[LossInput]) -> tuple[Direct, ...]:
    """Return the tensors of a call that are wanted, or that derivatives are taken of."""
    ends = (end for own in derivatives_of(sources) for end, _ in own.weights)
    return tuple({s: None for s in (*sources, *ends) if not isinstance(s, Derivative)})


class _Countdown:
    """Counts calls down."""

    def __init__(self, count: int) -> None:
        self._left = count

    def is_over_(self) -> bool:
        """Return whether this is the call that was counted down to."""
        self._left -= 1
        return self._left == -1


def found_inputs(inputs: Sequence[Direct], run: Run) -> tuple[Tensor, ...]:
    """Run a model and return tensors of the run; it ends early if none of them is returned.

    Raises:
        RuntimeError: If one is not found.
    """
    values: dict[int, Tensor] = {}
    versions: dict[int, int] = {}
    inner = {i: each for i, each in enumerate(inputs) if not isinstance(each, Returned)}

    def receive(index: int, tensor: Tensor) -> None:
        values[index], versions[index] = tensor, tensor._version
        if len(values) == len(inputs):
            raise _FoundError

    handles = [each.watch(partial(receive, index)) for index, each in inner.items()]
    try:
        with closed_interceptions():
            returned = list(tensors_of(run()))
    except _FoundError:
        return tuple(values[index] for index in range(len(inputs)))
    finally:
        for handle in handles:
            handle.remove()
    for index, each in enumerate(inputs):
        if isinstance(each, Returned):
            values[index] = returned[each.index]
        elif index not in values:
            raise RuntimeError(
                f"The model must reach {each.missing()} again when a recorded batch is replayed "
                "for adaptive=True, got a run that did not. Pass adaptive=False."
            )
        elif values[index]._version != versions[index]:
            raise RuntimeError(
                f"The model must not change {each.missing()} in place when adaptive=True, got an "
                "output that it overwrites. Write `x = x / t` in place of `x /= t`."
            )
    return tuple(values[index] for index in range(len(inputs)))


class _FoundError(BaseException):
    """Ends a run; models that catch ``Exception`` do not catch it."""


def loss_arguments(
    loss_fn: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of a call of a loss, in the order of its signature."""
    if not kwargs:
        return args
    bound = signature(loss_fn.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def with_kept_reduction(loss_fn: nn.Module, loss: Tensor) -> Tensor:
    """Return a loss whose backward pass raises if the reduction of its module has changed.

    Args:
        loss_fn: The module, which has no rule: what it returned is read when it is backpropagated.
        loss: What it returned.
    """
    known = is_sum(loss_fn)

    def check(_: Tensor) -> None:
        if is_sum(loss_fn) != known:
            raise RuntimeError(REDUCTIONS)

    loss.register_hook(check)  # type: ignore[no-untyped-call]
    return loss

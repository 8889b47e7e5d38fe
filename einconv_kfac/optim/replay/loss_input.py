"""How the argument of a loss follows from a call of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, ClassVar, Protocol, TypeAlias

from torch import Tensor, nn

Run: TypeAlias = Callable[[], Any]
"""Runs the model and returns what the model returns."""


class LossInput(Protocol):
    """Finds the argument of a loss in a call of the model."""

    is_inside: ClassVar[bool]
    """Whether the model itself calls the loss."""

    def found(self, run: Run) -> Tensor:
        """Run the model, and return the argument ``[n, ...]``."""


@dataclass(frozen=True)
class Returned:
    """The argument is a tensor that the model returns.

    Args:
        index: Its index among the tensors of the output, in the order of `tensors_of`.
    """

    is_inside: ClassVar[bool] = False

    index: int

    def found(self, run: Run) -> Tensor:
        """See `LossInput`."""
        return list(tensors_of(run()))[self.index]


@dataclass(frozen=True)
class Inside:
    """The model calls the loss.

    Args:
        loss_fn: The loss.
        index: The number of earlier calls of the loss in the same call of the model.
    """

    is_inside: ClassVar[bool] = True

    loss_fn: nn.Module
    index: int

    def found(self, run: Run) -> Tensor:
        """See `LossInput`; the run ends at that call of the loss."""
        calls = 0

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            if calls == self.index:
                raise _LossCalledError(loss_arguments(self.loss_fn, args, kwargs)[0])
            calls += 1

        handle = self.loss_fn.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run()
        except _LossCalledError as reached:
            return reached.argument
        finally:
            handle.remove()
        raise RuntimeError(
            f"The model must call `loss_fn` {self.index + 1} time(s) again when a recorded batch "
            f"is replayed for adaptive=True, got {calls}. Pass adaptive=False."
        )


class _LossCalledError(BaseException):
    """Ends a run at the call of a loss; models that catch ``Exception`` do not catch it."""

    def __init__(self, argument: Tensor) -> None:
        super().__init__()
        self.argument = argument


class Targets(tuple[Any, ...]):
    """Several targets of one loss, as in ``loss_fn(output, target, variance)``."""

    __slots__ = ()


def loss_arguments(
    loss_fn: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return the arguments of a call of a loss, in the order of its signature."""
    if not kwargs:
        return args
    bound = signature(loss_fn.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Yield the tensors of an output, which may be nested in tuples, lists and mappings."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list, Mapping)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from tensors_of(part)

"""Where a loss takes its argument: in what a model returns, or inside of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Protocol

from torch import Tensor, nn

Run = Callable[[], Any]


class Place(Protocol):
    """Where the argument of a loss is found."""

    def found(self, run: Run) -> Tensor:
        """Return the argument.

        Args:
            run: Runs the model and returns what it returns.
        """


@dataclass(frozen=True)
class Returned:
    """The argument is a tensor that the model returns.

    Args:
        index: Its number among the tensors that the model returns, see `tensors_of`.
    """

    index: int

    def found(self, run: Run) -> Tensor:
        """See `Place`."""
        return list(tensors_of(run()))[self.index]


@dataclass(frozen=True)
class Inside:
    """The loss is computed inside of the model.

    Args:
        loss_fn: The loss.
        index: The number of its call in the forward pass.
    """

    loss_fn: nn.Module
    index: int

    def found(self, run: Run) -> Tensor:
        """See `Place`; the forward pass ends where the loss is called."""
        calls = 0

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal calls
            if calls == self.index:
                raise _Reached(loss_arguments(self.loss_fn, args, kwargs)[0])
            calls += 1

        handle = self.loss_fn.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            run()
        except _Reached as reached:
            return reached.argument
        finally:
            handle.remove()
        raise RuntimeError(
            f"The model must call `loss_fn` {self.index + 1} time(s) again when it runs again on a "
            f"recorded batch with adaptive=True, got {calls}. Pass adaptive=False."
        )


class _Reached(BaseException):
    """Ends a forward pass at a loss; no model catches it by accident."""

    def __init__(self, argument: Tensor) -> None:
        super().__init__()
        self.argument = argument


class Targets(tuple[Any, ...]):
    """Several targets of one loss, as for ``loss_fn(output, target, variance)``."""

    __slots__ = ()


def loss_arguments(
    loss_fn: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return what a loss was called with, in the order of its signature."""
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

"""A task: a network, its data and loss, and the length of its training."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from evidence.data import Sources
from evidence.examples import Examples, Split

_CHUNK = 500


class Family(ABC):
    """Data, loss and test of tasks of one kind.

    Attributes:
        metric: Heading of the test's column in the table; empty without a test.
        scale: What the test's result is multiplied by in the table.
        rates: Smallest and largest learning rate that are tried, by optimizer, where they differ
            from those of classification.
        evaluated: Training examples on which the loss of every run is evaluated.
    """

    metric: ClassVar[str] = ""
    scale: ClassVar[float] = 1.0
    rates: ClassVar[Mapping[str, tuple[float, float]]] = {}
    evaluated: ClassVar[int] = 2000

    @property
    @abstractmethod
    def description(self) -> str:
        """Size and number of the examples, for the table."""

    @abstractmethod
    def data(self, sources: Sources) -> Split:
        """Return the examples."""

    @abstractmethod
    def loss_fn(self) -> nn.Module:
        """Return the loss module."""

    def loss(self, loss_fn: nn.Module, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss, averaged over examples."""
        loss: Tensor = loss_fn(output, y)
        return loss

    def test(self, model: nn.Module, examples: Examples) -> float:
        """Return the test's result for a model in evaluation mode; `metric` is its name.

        Raises:
            NotImplementedError: If the family has no test.
        """
        raise NotImplementedError(f"{type(self).__name__} must define test if metric is set.")


@dataclass(frozen=True)
class Task:
    """A network, its family, and the length of its training.

    Args:
        name: The letter of the task.
        title: Title in the table.
        model: Returns a new network; the caller has set the seed.
        batch_size: Examples per step.
        steps: Steps of a run.
        family: Data, loss and test.
        evaluations: Number of evaluations in a run; the last one follows the last step.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch_size: int
    steps: int
    family: Family
    evaluations: int = 30

    def due(self, step: int) -> bool:
        """Return whether to evaluate after ``step`` steps."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps


def chunks(examples: Examples) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield inputs and targets, some hundred examples at a time."""
    yield from zip(torch.split(examples.x, _CHUNK), torch.split(examples.y, _CHUNK))


def mean_loss(task: Task, model: nn.Module, examples: Examples) -> float:
    """Return the loss in evaluation mode."""
    family, total = task.family, 0.0
    model.eval()
    with torch.no_grad():
        for x, y in chunks(examples):
            total += float(family.loss(family.loss_fn(), model(x), x, y)) * len(x)
    model.train()
    return total / len(examples)


def measured(task: Task, model: nn.Module, examples: Examples) -> float:
    """Return the result of the task's test, in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = task.family.test(model, examples)
    model.train()
    return found


def batches(task: Task, count: int, seed: int) -> Callable[[int], Tensor]:
    """Return a function from a step to the indices of its examples, shuffled in each epoch.

    A batch of all examples keeps their order.
    """
    generator = torch.Generator().manual_seed(seed)
    orders: list[Tensor] = []
    per_epoch = max(count // task.batch_size, 1)

    def indices(step: int) -> Tensor:
        if task.batch_size >= count:
            return torch.arange(count)
        epoch, position = divmod(step, per_epoch)
        while len(orders) <= epoch:
            orders.append(torch.randperm(count, generator=generator))
        return orders[epoch][position * task.batch_size :][: task.batch_size]

    return indices

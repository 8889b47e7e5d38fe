"""The tasks (a) to (f), each in three sizes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from evidence.data import Split
from evidence.models import conv_autoencoder, deep_autoencoder, plain_cnn, resnet20, small_cnn


@dataclass(frozen=True)
class Task:
    """A network, its loss, its images, and the length of its training.

    Args:
        name: The letter of the task.
        title: Title in the table.
        model: Returns a new network; the caller has set the seed.
        batch_size: Examples per step.
        steps: Steps of a run.
        image_size: Height and width of the images.
        train_size: Number of training images that are used.
        autoencoder: Whether the targets are the images, one Bernoulli loss per pixel.
        evaluations: Number of evaluations in a run; the last one follows the last step.
    """

    name: str
    title: str
    model: Callable[[], nn.Module]
    batch_size: int
    steps: int
    image_size: int = 28
    train_size: int = 60_000
    autoencoder: bool = False
    evaluations: int = 30

    def loss_fn(self) -> nn.Module:
        """Return the loss module; that of autoencoders sums over pixels and images."""
        return nn.BCEWithLogitsLoss(reduction="sum") if self.autoencoder else nn.CrossEntropyLoss()

    def loss(self, loss_fn: nn.Module, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Return the loss, averaged over images; for autoencoders summed over pixels."""
        if not self.autoencoder:
            loss: Tensor = loss_fn(output, y)
            return loss
        total: Tensor = loss_fn(output, x.flatten(1))
        return total / len(x)

    def due(self, step: int) -> bool:
        """Return whether to evaluate after ``step`` steps."""
        return step * self.evaluations // self.steps > (step - 1) * self.evaluations // self.steps

    def data(self, split: Split) -> Split:
        """Return the images of this task."""
        return Split(split.train.first(self.train_size), split.test).at_size(self.image_size)


SIZES = (784, 1000, 500, 250, 30)

TASKS = {
    task.name: task
    for task in (
        Task("a", "CNN, batch 128", partial(small_cnn, 14, (16, 32), 64), 128, 1500, 14),
        Task("b", "CNN, batch 2048", partial(small_cnn, 14, (16, 32), 64), 2048, 150, 14),
        Task("c", "20 plain layers", partial(plain_cnn, 8), 128, 450),
        Task("d", "ResNet-20", partial(resnet20, 8), 128, 480, 14, 20_000),
        Task(
            "e",
            "convolutional autoencoder",
            partial(conv_autoencoder, 28, 8, 30),
            500,
            240,
            autoencoder=True,
        ),
        Task("f", "deep autoencoder", partial(deep_autoencoder, SIZES), 500, 160, autoencoder=True),
    )
}
"""The standard tasks; all runs of a comparison together take two hours of processor time."""

_FULL: dict[str, dict[str, Any]] = {
    "a": {"model": partial(small_cnn, 28, (32, 64), 128), "steps": 2350, "image_size": 28},
    "b": {"model": partial(small_cnn, 28, (32, 64), 128), "steps": 300, "image_size": 28},
    "c": {"model": partial(plain_cnn, 32), "steps": 2350},
    "d": {"model": partial(resnet20, 16), "steps": 2350, "image_size": 28},
    "e": {"model": partial(conv_autoencoder, 28, 32, 30), "steps": 1200},
    "f": {"steps": 1200},
}
_QUICK: dict[str, dict[str, Any]] = {
    "a": {"model": partial(small_cnn, 14, (2, 4), 8), "batch_size": 32},
    "b": {"model": partial(small_cnn, 14, (2, 4), 8), "batch_size": 64},
    "c": {"model": partial(plain_cnn, 2, 6), "batch_size": 16, "image_size": 14},
    "d": {"model": partial(resnet20, 2, 1), "batch_size": 16, "train_size": 256},
    "e": {"model": partial(conv_autoencoder, 28, 2, 4), "batch_size": 32},
    "f": {"model": partial(deep_autoencoder, (784, 16, 8, 4)), "batch_size": 32},
}


def tasks(size: str = "standard") -> dict[str, Task]:
    """Return the tasks by letter; ``size`` is ``"standard"``, ``"full"`` or ``"quick"``."""
    if size == "full":
        return {name: replace(task, **_FULL[name]) for name, task in TASKS.items()}
    if size == "quick":
        return {
            name: replace(task, steps=6, evaluations=3, **_QUICK[name])
            for name, task in TASKS.items()
        }
    return dict(TASKS)


def batches(task: Task, count: int, seed: int) -> Callable[[int], Tensor]:
    """Return a function from a step to the indices of its examples, shuffled in each epoch."""
    generator = torch.Generator().manual_seed(seed)
    orders: list[Tensor] = []
    per_epoch = max(count // task.batch_size, 1)

    def indices(step: int) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        while len(orders) <= epoch:
            orders.append(torch.randperm(count, generator=generator))
        return orders[epoch][position * task.batch_size :][: task.batch_size]

    return indices

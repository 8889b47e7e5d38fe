"""Fashion-MNIST: classes, and reconstruction by autoencoders."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from evidence.data import Sources, at_size
from evidence.examples import Examples, Split
from evidence.task import Family, chunks


@dataclass(frozen=True)
class _Images(Family):
    """Images of Fashion-MNIST.

    Args:
        image_size: Height and width.
        train_size: Number of training images that are used.
    """

    image_size: int = 28
    train_size: int = 60_000

    @property
    def description(self) -> str:
        """See `Family`."""
        return f"{self.image_size}x{self.image_size}, {self.train_size} images"

    def data(self, sources: Sources) -> Split:
        """See `Family`."""
        images = sources.images
        train = at_size(images.train.first(self.train_size), self.image_size)
        return Split(train, at_size(images.test, self.image_size))

    @abstractmethod
    def loss_fn(self) -> nn.Module:
        """See `Family`."""


@dataclass(frozen=True)
class Classification(_Images):
    """The class of an image, by cross-entropy; the test is accuracy."""

    metric: ClassVar[str] = "test %"
    scale: ClassVar[float] = 100.0

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.CrossEntropyLoss()

    def test(self, model: nn.Module, examples: Examples) -> float:
        """See `Family`."""
        return accuracy(model, examples)


@dataclass(frozen=True)
class Reconstruction(_Images):
    """The images themselves as targets, one Bernoulli loss per pixel; summed over pixels."""

    rates: ClassVar[Mapping[str, tuple[float, float]]] = {"SGD": (1e-4, 1e-2)}

    def loss_fn(self) -> nn.Module:
        """See `Family`."""
        return nn.BCEWithLogitsLoss(reduction="sum")

    def loss(self, loss_fn: nn.Module, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """See `Family`."""
        total: Tensor = loss_fn(output, x.flatten(1))
        return total / len(x)


def accuracy(model: nn.Module, examples: Examples) -> float:
    """Return the fraction of examples whose class has the largest score."""
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in chunks(examples))
    return right / len(examples)
